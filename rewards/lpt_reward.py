"""L_PT: the language-model loss on raw Faroese text that keeps the student's Faroese (MiniLLM, section 2.2).

It is a reward for predicting text that people wrote, added to the objective as a loss: the text is not sampled from
the student, so there is no policy gradient, only -log pi_theta(text).
"""

from __future__ import annotations

import torch


def lpt_loss(policy_logprobs_S: torch.Tensor, tokens: float | torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats a token, scalar: -sum log pi(w_s | w_<s) / `tokens`.

    `policy_logprobs_S`: float32 [S] of this micro-batch. `tokens`: predicted tokens of the whole batch over all
    micro-batches and ranks, so that the gradient does not depend on how the batch was cut.
    """
    return -policy_logprobs_S.sum() / tokens
