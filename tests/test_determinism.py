"""The same seed gives the same bits in every process; deterministic=True refuses what it cannot promise."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_trainer import CONFIG, MODEL, corpus

from fastchargpt.determinism import check_deterministic, deterministic_algorithms
from fastchargpt.errors import BackendUnavailableError, TrainingError
from fastchargpt.trainer import Trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_the_same_seed_gives_the_same_bits_in_every_process() -> None:
    program = """
import dataclasses, hashlib
from test_trainer import CONFIG, MODEL, corpus
from fastchargpt.generation import generate
from fastchargpt.sampling import SamplingConfig
from fastchargpt.trainer import Trainer
digest = hashlib.sha256()
text = corpus()
trainer = Trainer(MODEL, dataclasses.replace(CONFIG, order="epochs"), text, log=lambda line: digest.update(
    b"" if line.startswith("compile") else line.split(", time")[0].encode()))
trainer.run()
for parameter in trainer.model.parameters():
    digest.update(parameter.detach().numpy().tobytes())
digest.update(generate(trainer.model, text.tokenizer, "a", SamplingConfig(max_new_tokens=20, seed=3))[0].text.encode())
print(digest.hexdigest())
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "PYTHONHASHSEED": hash_seed},
        )
        for hash_seed in ("0", "42")
    ]
    first, second = (process.communicate(timeout=120)[0] for process in processes)
    assert len(first.strip()) == 64
    assert first == second


def test_the_switch_is_on_for_the_run_alone() -> None:
    trainer = Trainer(MODEL, dataclasses.replace(CONFIG, deterministic=True), corpus(), log=lambda line: None)
    assert any(line.startswith("deterministic: ") for line in trainer.describe())
    seen: list[bool] = []
    plain = trainer.batches.next_batch

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return plain()

    trainer.batches.next_batch = next_batch  # type: ignore[method-assign]
    trainer.run()
    assert seen == [True] * 20
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_changes_no_bit_on_a_cpu() -> None:
    runs: list[Trainer] = []
    for on in (False, True):
        runs.append(Trainer(MODEL, dataclasses.replace(CONFIG, deterministic=on), corpus(), log=lambda _: None))
        runs[-1].run()
    pairs = zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_deterministic(CPU, "on")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(BackendUnavailableError, match=r"CUBLAS_WORKSPACE_CONFIG set to :4096:8 or :16:8 .* not set"):
        check_deterministic(GPU, "auto")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    check_deterministic(GPU, "auto")
    with pytest.raises(BackendUnavailableError, match="cannot be had with compile=on on a GPU"):
        check_deterministic(GPU, "on")
    with pytest.raises(BackendUnavailableError, match="cannot be had on mps"):
        check_deterministic(torch.device("mps"), "auto")


def test_torchs_refusal_is_one_of_ours_and_other_errors_pass() -> None:
    sentence = "put_ does not have a deterministic implementation, but you set 'torch.use_deterministic...'\nmore"
    with (
        pytest.raises(BackendUnavailableError, match=r"cannot be served: put_ does not have a deterministic"),
        deterministic_algorithms(True),
    ):
        raise RuntimeError(sentence)
    with pytest.raises(RuntimeError, match="shapes"), deterministic_algorithms(True):
        raise RuntimeError("shapes")
    with pytest.raises(TrainingError), deterministic_algorithms(True):
        raise TrainingError("the deterministic run's loss is nan")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_algorithms(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_two_runs_on_a_gpu_are_bit_equal() -> None:
    program = """
import dataclasses, hashlib
from test_trainer import CONFIG, MODEL, corpus
from fastchargpt.trainer import Trainer
config = dataclasses.replace(CONFIG, device="cuda", deterministic=True)
trainer = Trainer(dataclasses.replace(MODEL, n_embd=128, block_size=32), config, corpus(), log=lambda line: None)
trainer.run()
print(hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in trainer.model.parameters())).hexdigest())
"""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
        ).stdout
        for _ in range(2)
    }
    assert len(digests) == 1
