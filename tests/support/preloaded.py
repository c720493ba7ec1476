# ruff: noqa: F401
"""What the fork server of tests/support/forked.py imports before it forks: all that a run does, at once or later."""

import accelerate
import babel.numbers
import countryinfo
import peft
import sentencepiece
import torch._dynamo
import torch.utils.tensorboard
import transformers.models.llama.modeling_llama

import eval.report
import training.main
import training.pretrain
import training.sft
import training.stage2
import training.supervised
