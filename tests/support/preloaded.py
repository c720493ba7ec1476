# ruff: noqa: F401
"""What the fork server of tests/support/forked.py imports before it forks: all that runs, teachers and workers do."""

import os

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as inference/serve_teacher.py has it; read once

from configs.io.loading import loading

with loading():
    import accelerate
    import babel.numbers
    import countryinfo
    import peft
    import sentencepiece
    import torch._dynamo
    import torch.utils.tensorboard
    import transformers.models.llama.modeling_llama

    import eval.report
    import inference.model.scoring
    import inference.model.teacher
    import inference.server.engine
    import inference.server.self_test
    import inference.server.server
    import training.main
    import training.pretrain
    import training.sft
    import training.stage2
    import training.supervised
    import training.tools.doctor
