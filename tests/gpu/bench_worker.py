"""The measurements of one model in one process, started by bench_gpu.py. Each is a line of JSON on standard output.

What is timed runs between two CUDA events with a synchronisation at the end (on a CPU: the clock), after a warm-up.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import statistics
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    # Some packages install their own tests under this name, which would win over a folder without __init__.py.
    sys.modules["tests"] = types.ModuleType("tests")
    sys.modules["tests"].__path__ = [str(ROOT / "tests")]

import torch
import transformers

from configs.schema import ActorConfig, DataConfig, RunConfig, SamplingConfig, StudentConfig
from inference.attention import packed as attention
from inference.attention.packing import pack
from tests.gpu import bench_shapes as shapes
from tests.gpu.bench_shapes import GROUP, Shape, Work
from tests.support.experiences import experience_of, prompts_of, rollout_of
from tests.support.recorded_graph import recorded
from training.experience import Prompt, Rollout
from training.objective import LossWeights, UpdateInput
from training.student import actor as actor_module
from training.student import graph_decoder, sampling
from training.student.actor import Actor
from training.student.deepspeed_engine import start_distributed
from training.student.policy import Policy, Way
from training.student.sampling import Drawing, sample

MARK = "MEASURED "
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""Calls in which the host waits for the device."""
FEW, MORE = 3, 7
"""Tokens that decoding is profiled with; the difference is what MORE - FEW steps ask of the device."""
ENOUGH_S = 4.0
"""A measurement that has taken this long is not repeated."""


class Bench:
    """One model's measurements."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.name, self.shape = options.model, {**shapes.MODELS, **shapes.TINY_MODELS}[options.model]
        self.tokens = shapes.TINY_TOKENS if options.tiny else shapes.TOKENS
        self.prompts, self.rounds = options.prompts, options.rounds
        self.folder = Path(tempfile.mkdtemp(prefix="grpo-kd-gpu-"))
        self.config = model_folder(self.shape, self.folder)
        self.flash = attention.flash_attention(self.device) is not None
        self.own_waits = 0
        for _ in range(2):  # the first profile of a process also waits for its own start
            _, self.own_waits = self.counted(lambda: None)

    # What is measured ----------------------------------------------------------------------------------------------

    def models(self) -> None:
        """Every phase of the student and of the teacher."""
        row_tokens = RunConfig().actor.micro_batch_tokens
        trains = self.fits("update", "all", shapes.update_bytes(self.shape, row_tokens))
        policy, actor = None, None
        with self.part("build", "all", ""):
            if trains:
                actor = self.actor()
                policy = actor.policy
            else:
                policy = self.policy()
        if policy is None:
            return
        policy.eval()
        for grouped in (True, False):
            if not grouped:
                policy.run(Way.PLAIN)
            for label in self.tokens if grouped else list(self.tokens)[:2]:
                need = shapes.inference_bytes(self.shape, self.prompts, *self.tokens[label])
                if self.fits("sampling, reference", label, need + (18 * self.shape.parameters if trains else 0)):
                    self.student(policy, actor, label, grouped=grouped)
        del policy, actor
        self.clear()
        if self.fits("teacher", "all", 2 * self.shape.parameters + 6e9):
            self.teacher()

    def student(self, policy: Policy, actor: Actor | None, label: str, *, grouped: bool) -> None:
        """Prefill, decode, reference, update at one shape of prompt and response."""
        P, R = self.tokens[label]
        prompts, rollout = self.batch(P, R)
        tokens = [p.tokens for p in prompts]
        groups = pack(rollout.groups(), self.run_config(R).actor.micro_batch_tokens)
        once = shapes.forward(self.prompts, P, R, grouped=grouped)

        @torch.no_grad()
        def reference() -> None:
            for row in groups:
                policy(row.to(self.device)).logprobs_S.cpu()

        def update() -> None:
            assert actor is not None
            experience = experience_of(rollout, torch.randn(rollout.behavior_logprobs_S.shape))
            metrics = actor.update([UpdateInput(experience, (), (), LossWeights(policy=1.0))], 0)
            assert not metrics["skipped"]

        @torch.no_grad()
        def prefill() -> None:
            sampling.make_decoder(policy, tokens, GROUP, R)

        for kernel in self.kernels() if grouped else ["plain rows"]:
            with self.kernel(kernel):
                self.measure("prefill", label, kernel, shapes.prefill(self.prompts, P, grouped=grouped), prefill)
                self.measure("reference", label, kernel, once, reference)
                if actor is not None:
                    self.measure("update", label, kernel, replace(once, factor=3), update)
        work = shapes.decode(self.prompts, P, R)
        for variant in ("grouped, graph", "grouped, no graph") if grouped else ("plain rows",):
            graph = variant == "grouped, graph"
            whole, few, more = (self.decoding(policy, tokens, length, graph=graph) for length in (R, FEW, MORE))
            with self.graph(graph):
                self.measure("decode", label, variant, work, whole, (few, more))

    def decoding(
        self, policy: Policy, prompts: list[tuple[int, ...]], response: int, *, graph: bool
    ) -> Callable[[], float]:
        """Our sampler to the last token; it returns the seconds after the first."""
        config = SamplingConfig(group_size=GROUP, max_new_tokens=response)

        def run() -> float:
            clock = Clock(self.device)
            streams = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
            drawing = Drawing((), streams, on_step=lambda t: clock.start() if t == 0 else None)
            sample(policy, prompts, config, drawing)
            seconds = clock.stop()
            if graph and not policy.capturable:
                raise RuntimeError("the decoding step could not be captured: the log says why")
            return seconds

        return run

    def teacher(self) -> None:
        """Megatron's model and our scoring, one rank, without the wire."""
        from inference.model import teacher as teacher_module
        from inference.model.scoring import Scorer
        from inference.protocol.wire import Request

        with self.part("teacher", "all", ""):
            with (
                mock.patch.object(teacher_module, "Checkpoint"),
                mock.patch.object(teacher_module, "load_weights", random_weights),
            ):
                teacher = teacher_module.Teacher(self.folder, "bfloat16", device=self.device)
            scorer = Scorer(teacher, max_batch_tokens=16384, logit_chunk=1024)
            for label, (P, R) in self.tokens.items():
                _, rollout = self.batch(P, R)
                request = Request("score", tuple(rollout.groups()))
                work = shapes.forward(self.prompts, P, R, grouped=True)
                for kernel in self.kernels():
                    with self.kernel(kernel):
                        self.measure("teacher", label, kernel, work, lambda r=request: scorer.score(r))

    # How it is measured ----------------------------------------------------------------------------------------------

    def measure(
        self,
        phase: str,
        tokens: str,
        variant: str,
        work: Work,
        run: Callable[[], Any],
        steps: tuple[Callable[[], Any], Callable[[], Any]] | None = None,
    ) -> None:
        """Median seconds of `run` (or of what it returns), the highest memory meanwhile, and what the device was asked
        to do: in one call, or in one step where `steps` has decoding to FEW and to MORE tokens."""
        with self.part(phase, tokens, variant):
            self.clear()
            (steps[0] if steps else run)()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds: list[float] = []
            while len(seconds) < self.rounds and sum(seconds) < ENOUGH_S:
                clock = Clock(self.device)
                clock.start()
                own = run()
                whole = clock.stop()
                seconds.append(own if isinstance(own, float) else whole)
            peak = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None
            kernels, waits = self.counted_step(*steps) if steps else self.counted(run)
            self.report(
                {
                    "phase": phase,
                    "tokens": tokens,
                    "variant": variant,
                    "seconds": statistics.median(seconds),
                    "rounds": len(seconds),
                    "count": work.tokens,
                    "flops": work.flops(self.shape),
                    "bytes": work.bytes(self.shape),
                    "memory_gb": peak,
                    "kernels": kernels,
                    "waits": waits,
                }
            )

    def counted_step(self, few: Callable[[], Any], more: Callable[[], Any]) -> tuple[int, int]:
        """`counted` of one decoding step: prefill and the first token are in both, and cancel."""
        (kernels, waits), (kernels_more, waits_more) = self.counted(few), self.counted(more)
        return round((kernels_more - kernels) / (MORE - FEW)), round((waits_more - waits) / (MORE - FEW))

    def counted(self, run: Callable[[], Any]) -> tuple[int, int]:
        """Kernels that one call started, and how often the host waited for the device in it (without the profiler's
        own waits)."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            run()
        kernels = waits = 0
        for event in profile.key_averages():
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.key.startswith(("Memcpy", "Memset")):
                kernels += event.count
            waits += event.count if event.key in WAITS else 0
        return kernels, waits - self.own_waits

    @contextmanager
    def part(self, phase: str, tokens: str, variant: str) -> Iterator[None]:
        """A failure is a line, and the rest goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
            self.report({"phase": phase, "tokens": tokens, "variant": variant, "error": reason})

    def report(self, values: dict[str, Any]) -> None:
        """One line to bench_gpu.py."""
        print(MARK + json.dumps({"model": self.name, **values}), flush=True)

    def fits(self, phase: str, tokens: str, need: float) -> bool:
        """Whether the device has that much memory left; else a line says so."""
        if self.device.type != "cuda":
            return True
        self.clear()
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_allocated()
        if need <= free:
            return True
        note = f"does not fit: about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are there"
        self.report({"phase": phase, "tokens": tokens, "variant": "all", "note": note})
        return False

    def clear(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def kernels(self) -> list[str]:
        """Attention of packed rows."""
        return ["grouped, SDPA", "grouped, flash"] if self.flash else ["grouped, SDPA"]

    @contextmanager
    def kernel(self, name: str) -> Iterator[None]:
        """With that attention."""
        if name == "grouped, flash":
            yield
        else:
            with mock.patch.object(attention, "flash_attention", lambda device: None):  # noqa: PT008
                yield

    @contextmanager
    def graph(self, wanted: bool) -> Iterator[None]:
        """Decode by a captured graph (on a CPU: by a recording of the step), or without."""
        with ExitStack() as stack:
            if not wanted or self.device.type == "cpu":
                stack.enter_context(mock.patch.object(sampling, "stays_on_device", return_value=wanted))
            if self.device.type == "cpu":
                stack.enter_context(mock.patch.object(graph_decoder, "captured", recorded))
            yield

    # What it is measured on ------------------------------------------------------------------------------------------

    def policy(self) -> Policy:
        """A student with random weights, made on the device."""
        torch.manual_seed(0)
        with self.device:
            model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16)
        return Policy(model)

    def actor(self) -> Actor:
        """The same under DeepSpeed."""
        longest = max(R for _, R in self.tokens.values())
        with mock.patch.object(actor_module, "load_policy", lambda *_, **__: self.policy()):  # noqa: PT008
            return Actor(self.run_config(longest), total_steps=1, learning_rate=1e-6)

    def run_config(self, response: int) -> RunConfig:
        """A run's own defaults, but for ZeRO 0: there is one rank, and nothing to share."""
        return RunConfig(
            student=StudentConfig(path=str(self.folder), dtype="bfloat16"),
            data=DataConfig(max_prompt_tokens=max(P for P, _ in self.tokens.values())),
            sampling=SamplingConfig(group_size=GROUP, max_new_tokens=response),
            actor=ActorConfig(zero_stage=0),
        )

    def batch(self, prompt: int, response: int) -> tuple[list[Prompt], Rollout]:
        """Random prompts and responses."""
        stream = torch.Generator().manual_seed(1)

        def draw(count: int, length: int) -> list[tuple[int, ...]]:
            return [tuple(r) for r in torch.randint(3, self.shape.vocab, (count, length), generator=stream).tolist()]

        responses = draw(self.prompts * GROUP, response)
        logprobs_S = torch.full((len(responses) * response,), -math.log(self.shape.vocab))
        rollout = rollout_of(prompts_of(draw(self.prompts, prompt)), responses, logprobs_S)
        return list(rollout.prompts_N), rollout


class Clock:
    """Seconds on the device between two points of the program."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._cuda else []
        self._began = 0.0

    def start(self) -> None:
        """From here."""
        if self._cuda:
            self._events[0].record()
        self._began = time.perf_counter()

    def stop(self) -> float:
        """To here, when the device has come this far too."""
        if not self._cuda:
            return time.perf_counter() - self._began
        self._events[1].record()
        torch.cuda.synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000.0


def model_folder(shape: Shape, folder: Path) -> Any:
    """A model directory without weights; returns transformers' configuration."""
    from tests.support.teacher_models import save_tokenizer

    kind = {"llama": "Llama", "mistral": "Mistral"}[shape.family]
    config = getattr(transformers, f"{kind}Config")(**shape.settings())
    config.architectures = [f"{kind}ForCausalLM"]
    config.save_pretrained(folder)
    save_tokenizer(folder)
    return config


def random_weights(model: torch.nn.Module, *_: Any, **__: Any) -> None:
    """In place of a checkpoint: small numbers, written once and repeated, because drawing 7e9 of them takes a while."""
    some = torch.randn(1 << 20) * 0.02
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        if "norm" in name:
            flat.fill_(1.0)
            continue
        for start in range(0, len(flat), len(some)):
            flat[start : start + len(some)].copy_(some[: len(flat) - start])


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    start_distributed()
    Bench(options).models()


if __name__ == "__main__":
    main()
