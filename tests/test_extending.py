"""The examples of docs/extending.md, each taken from the page and used."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.io.results import read_result
from configs.schema import RewardConfig, RunConfig
from eval.experiments.plan import read_plan
from eval.measure import settings_of
from eval.measures import MEASURES
from rewards.base import RewardInput, RewardOutput
from rewards.parts import PARTS
from tests.support.experiences import experience_of, prompts_of, rollout_of
from training.algorithms import ALGORITHMS
from training.experience import Rewarded
from training.objective import LossWeights
from training.recipes import RECIPES
from training.run.choices import check_choices
from training.run.cli import demo_config, parse
from training.run.stopping import RunFailed
from training.teacher.reward_parts import check_extra_rewards, configured_parts, custom_function

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")


def example(name: str) -> dict[str, Any]:
    """What the block of the page that begins with `# name` defines."""
    (code,) = re.findall(rf"```python\n# {name}\n(.*?)```", PAGE, re.S)
    defined: dict[str, Any] = {"PARTS": dict(PARTS)}
    exec(code, defined)
    return defined


def inputs(texts: list[str]) -> RewardInput:
    count = len(texts)
    tokens = torch.zeros(count)
    return RewardInput(
        torch.ones(count, dtype=torch.int64), torch.ones(count).bool(), tokens, tokens, texts, [()] * count
    )


def test_an_algorithm_is_one_file_and_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"algo = 'reinforce': is unknown; use one of grpo, ppo"):
        check_choices(RunConfig(algo="reinforce"))
    monkeypatch.setitem(ALGORITHMS, "reinforce", example("algorithm")["Reinforce"]())
    config = RunConfig(algo="reinforce")
    check_choices(config)
    rollout = rollout_of(prompts_of([(1,), (2,)]), [(3, 4), (5,)])
    rewarded = Rewarded(
        experience_of(rollout, torch.zeros(3)).scored, RewardOutput(torch.tensor([1.0, 2.0, 7.0]), None, {})
    )
    advantages_S, targets_S = ALGORITHMS["reinforce"].advantages(rewarded, config, 0.0)
    assert advantages_S.tolist() == [-2.0, -2.0, 2.0]  # scores 3 and 7, mean 5
    assert targets_S is None


def test_a_recipe_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "on_policy_kl", example("recipe")["ROW"]["on_policy_kl"])
    config = RunConfig(recipe="on_policy_kl")
    check_choices(config)
    weights = RECIPES["on_policy_kl"].weights(config, 0, same_tokenizer=True)
    assert weights == LossWeights(pt=0.1, single_step=1.0)


def test_a_reward_of_ones_own(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n# custom reward\n(.*?)```", PAGE, re.S)
    file = tmp_path / "my_rewards.py"
    file.write_text(code)
    config = RunConfig(rewards=RewardConfig(custom=f"{file}:one_sentence", custom_weight=0.5))
    check_extra_rewards(config)
    assert configured_parts(inputs(["Ja.", "Ja. Nei.", ""]), config)["custom"].tolist() == [1.0, 0.0, 1.0]


def test_a_custom_reward_may_define_dataclasses(tmp_path: Path) -> None:
    file = tmp_path / "with_dataclass.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Mark:\n    value: float\n"
        "def score(inputs):\n    return [Mark(2.0).value for _ in inputs.texts_B]\n"
    )
    config = RunConfig(rewards=RewardConfig(custom=f"{file}:score", custom_weight=0.5))
    assert configured_parts(inputs(["a", "b"]), config)["custom"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[1.0]", "it returned 1 numbers for 3 responses of 3 tokens"),
        ("[1.0, float('nan'), 1.0]", "number 1 of 3 is nan; return finite numbers"),
        ("[1.0, 1.0, 1e39]", "number 2 of 3 is 1e+39; return finite numbers"),
        ("[1 / 0]", "it raised ZeroDivisionError: division by zero"),
        ("['good'] * 3", "it raised ValueError: could not convert string to float"),
    ],
)
def test_what_a_custom_reward_does_wrong_ends_the_run_in_one_line(body: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(f"def score(inputs):\n    return {body}\n")
    config = RunConfig(rewards=RewardConfig(custom=f"{file}:score", custom_weight=0.5))
    custom_function.cache_clear()
    with pytest.raises(RunFailed, match=re.escape(message)) as failed:
        configured_parts(inputs(["a", "b", "c"]), config)
    assert "\n" not in str(failed.value)


def test_a_part_is_a_function_of_the_rollout() -> None:
    part = example("part")["PARTS"]["brevity"]
    assert part(inputs(["ein tvey", ""]), RewardConfig()) == [1 / 3, 1.0]


def test_a_measure_is_one_function(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Ein hestur.\nTveir hestar renna.\n")
    fertility = example("measure")["fertility"]
    model = SimpleNamespace(path="model", tokenizer=lambda said, **_: SimpleNamespace(input_ids=said.encode()))
    result = fertility(model, settings_of(fertility)(text=text))
    result.write(tmp_path / "fertility.json")
    assert read_result(tmp_path / "fertility.json").values["tokens_per_word"].value == (11 + 19) / 5


def test_an_experiment_is_one_file(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n# experiment\n(.*?)```", PAGE, re.S)
    (tmp_path / "mine.yaml").write_text(text)
    plan = read_plan(tmp_path / "mine.yaml")
    runs = [parse(plan.arguments(variant, {}), "test", demo_config) for variant in plan.variants]
    assert [config.loss.kl_coef for config in runs] == [0.0, 0.1]
    assert set(plan.measures) <= set(MEASURES)


def test_the_commands_of_the_page_name_settings_that_exist() -> None:
    for flag in re.findall(r"--(rewards\.\w+)", PAGE):
        assert hasattr(RewardConfig(), flag.split(".")[1]), flag
