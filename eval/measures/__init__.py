"""What can be measured of a model. A measure is a function from a model and its settings to a `Result`.

Its settings are a frozen dataclass, whose fields are the options of `python eval/measure.py NAME`. To add one: write
such a function in a file of its own, and a row in MEASURES (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from configs.io.results import Result
from eval.measures.heldout import heldout
from eval.measures.language import language
from eval.measures.minimal_pairs import minimal_pairs
from eval.measures.model import Model
from eval.measures.open_questions import open_questions
from eval.measures.perplexity import perplexity
from eval.measures.translate import translate

MEASURES: Mapping[str, Callable[[Model, Any], Result]] = {
    "perplexity": perplexity,
    "minimal_pairs": minimal_pairs,
    "translate": translate,
    "language": language,
    "heldout": heldout,
    "open_questions": open_questions,
}
