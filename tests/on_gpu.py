"""What only a GPU can show: python -m pytest tests/on_gpu.py, by an interpreter that has onnxruntime-gpu.

Not collected by scripts/test. The demo model is converted for CUDA at each precision, or taken from where it was
converted before, $GPT2_EDGE_CUDA_PACKAGES/PRECISION; what it gives is held against the float32 package on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from export.convert import convert
from runtime import Request, SamplingOptions, TextGenerator, TextSession
from runtime.decoder import Decoder
from runtime.device_decoder import DeviceDecoder
from runtime.package import Precision, open_package
from runtime.receipt import SHAPE_OPERATORS
from runtime.text_generator import open_decoder

ROOT = Path(__file__).parent.parent
PRECISIONS: tuple[Precision, ...] = ("fp16", "int8", "int4")
PROMPTS = ["Once upon a time", "The ship", "It was a dark and stormy night; the rain fell in torrents", "She said"]
GREEDY = SamplingOptions.greedy()

ROUNDING = 0.15
"""Of logits, between float16 kernels for one row and those for several, or for a prompt. On an H200: 0.034 at fp16,
0.025 at int8."""

FURTHEST = {"fp16": 0.01, "int8": 0.03, "int4": 0.3}
"""Mean error of a token's log-probability against float32. On the CPU, which runs the same packages: 0.0014, 0.0075 and
0.12."""

LEAST_SAME = 3 / 4
"""Share of greedy texts that a batch leaves as they are: rounding may turn a choice. On an H200: all of 12."""


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, Path]:
    if folder := os.environ.get("GPT2_EDGE_CUDA_PACKAGES"):
        return {precision: Path(folder) / precision for precision in PRECISIONS}
    converted = tmp_path_factory.mktemp("packages")
    return {
        precision: convert(ROOT / "models" / "demo", converted / precision, precision=precision, device="cuda").package
        for precision in PRECISIONS
    }


@pytest.fixture(scope="session", params=PRECISIONS)
def package(request: pytest.FixtureRequest, packages: dict[Precision, Path]) -> Path:
    return packages[request.param]


@pytest.fixture(scope="session")
def decoder(package: Path) -> Iterator[DeviceDecoder]:
    opened = open_decoder(open_package(package))
    assert isinstance(opened, DeviceDecoder)
    yield opened


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> TextGenerator:
    folder = tmp_path_factory.mktemp("reference") / "fp32"
    return TextGenerator.load(convert(ROOT / "models" / "demo", folder, precision="fp32").package)


@pytest.fixture(scope="session")
def generator(package: Path) -> TextGenerator:
    return TextGenerator.load(package, device="cuda")


def random_ids(decoder: Decoder, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, decoder.config.n_vocab, length)


def test_verify_passes_and_its_receipt_names_cuda_alone(package: Path) -> None:
    command = [sys.executable, "-m", "runtime.verify", package, "--device", "cuda", "--full", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    print(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    print(told["receipt"], [golden["largest_difference"] for golden in told["golden"]])
    assert told["held"] and told["receipt"]["copies"] == 0
    on_cpu = told["receipt"]["nodes"].get("CPUExecutionProvider", 0)
    assert set(told["receipt"]["providers"]) <= {"CUDAExecutionProvider", "CPUExecutionProvider"}
    assert on_cpu <= len(SHAPE_OPERATORS)


def test_a_captured_step_is_right_at_every_length(decoder: DeviceDecoder) -> None:
    ids = random_ids(decoder, decoder.config.n_ctx)
    whole = np.concatenate([piece.copy() for piece in decoder.logits(ids, chunk_tokens=len(ids))])
    decoding = decoder.start(batch=1, capacity=1)  # grows, and changes its mask's length, on the way
    worst = 0.0
    for position, token in enumerate(ids):
        logits = decoding.decode_step(np.array([token]))[0]
        worst = max(worst, float(np.abs(logits - whole[position]).max()))
    print("worst", worst)
    assert worst < ROUNDING


def test_rows_of_a_batch_give_what_each_gives_alone(decoder: DeviceDecoder) -> None:
    lengths = (3, 140, 17, 260, 90)
    together = decoder.start(batch=len(lengths), capacity=64)
    alone = [decoder.start(batch=1, capacity=64) for _ in lengths]
    worst = 0.0
    for row, length in enumerate(lengths):
        ids = random_ids(decoder, length, seed=row)
        first = together.prefill(row, ids).copy()
        worst = max(worst, float(np.abs(first - alone[row].prefill(0, ids)).max()))
    for step in range(60):
        ids = random_ids(decoder, len(lengths), seed=100 + step)
        logits = together.decode_step(ids)
        for row, own in enumerate(alone):
            worst = max(worst, float(np.abs(logits[row] - own.decode_step(ids[row : row + 1])[0]).max()))
    print("worst", worst)
    assert worst < ROUNDING


def test_a_copied_row_goes_on_as_its_source(decoder: DeviceDecoder) -> None:
    decoding = decoder.start(batch=3, capacity=100)
    decoding.prefill(1, random_ids(decoder, 70))
    decoding.cache.copy_row(1, 0)
    decoding.cache.copy_row(1, 2, tokens=69)
    decoding.prefill(2, random_ids(decoder, 70)[69:])
    for step in range(80):
        logits = decoding.decode_step(np.full(3, step))
        np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=ROUNDING)
        np.testing.assert_allclose(logits[2], logits[1], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("wanted", [1, 40, 63])
def test_what_is_picked_on_the_device_is_the_largest(decoder: DeviceDecoder, wanted: int) -> None:
    some, every = decoder.start(batch=2, capacity=50), decoder.start(batch=2, capacity=50)
    for row in range(2):
        some.prefill(row, random_ids(decoder, 9 + row))
        every.prefill(row, random_ids(decoder, 9 + row))
    for step in range(20):
        ids = np.array([step, step + 7])
        picked, whole = some.decode_step(ids, wanted=wanted).copy(), every.decode_step(ids)
        for own, all_of_them in zip(picked, whole, strict=True):
            assert own.argmax() == all_of_them.argmax()
            if wanted > 1:
                top = np.sort(all_of_them)[-wanted:]
                np.testing.assert_array_equal(np.sort(own)[-wanted:], top)


def test_tokens_are_as_probable_as_to_the_float32_model(
    packages: dict[Precision, Path], reference: TextGenerator
) -> None:
    ids = reference.generate(PROMPTS[2], max_new_tokens=400, sampling=SamplingOptions(seed=1)).samples[0].ids
    expected = reference.score(ids)
    for precision, furthest in FURTHEST.items():
        error = np.abs(TextGenerator.load(packages[precision]).score(ids) - expected)
        print(precision, "log-probabilities off by", error.mean(), "at most", error.max())
        assert error.mean() < furthest


def test_one_seed_gives_one_text_whether_logits_are_picked_there_or_fetched(generator: TextGenerator) -> None:
    def untouched(ids: object, logits: np.ndarray) -> np.ndarray:
        return logits

    for prompt, sampling in product(PROMPTS, (GREEDY, SamplingOptions(top_k=40, seed=5))):
        picked = generator.generate(prompt, max_new_tokens=40, sampling=sampling).samples[0]
        fetched = generator.generate(prompt, max_new_tokens=40, sampling=sampling, logits_processor=untouched).samples[
            0
        ]
        assert picked.ids == fetched.ids


def test_generate_many_gives_what_generate_gives(generator: TextGenerator) -> None:
    requests = [
        Request(prompt, max_new_tokens=20 + 5 * index, sampling=GREEDY) for index, prompt in enumerate(PROMPTS * 3)
    ]
    alone = [
        generator.generate(request.prompt, max_new_tokens=request.max_new_tokens, sampling=GREEDY)
        for request in requests
    ]
    many = list(generator.generate_many(requests, batch_size=3))
    same = [one.samples[0].ids == other.samples[0].ids for one, other in zip(alone, many, strict=True)]
    print("same", sum(same), "of", len(same))
    assert sum(same) >= LEAST_SAME * len(same)


def test_threads_share_a_decoder(generator: TextGenerator) -> None:
    expected = {
        prompt: generator.generate(prompt, max_new_tokens=60, sampling=GREEDY).samples[0].ids for prompt in PROMPTS
    }

    def work(prompt: str) -> bool:
        texts = (generator.generate(prompt, max_new_tokens=60, sampling=GREEDY).samples[0].ids for _ in range(4))
        return all(ids == expected[prompt] for ids in texts)

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert all(pool.map(work, PROMPTS))


def test_a_session_goes_on_goes_back_and_is_saved(generator: TextGenerator, tmp_path: Path) -> None:
    session = TextSession(generator, sampling=GREEDY)
    session.append(PROMPTS[0])
    first = session.generate(max_new_tokens=10).ids
    session.rewind(len(session.ids) - 10)
    assert session.generate(max_new_tokens=10).ids == first
    session.save(tmp_path / "session.npz")
    restored, fork = TextSession.restore(generator, tmp_path / "session.npz"), session.fork()
    further = session.generate(max_new_tokens=10).ids
    assert restored.generate(max_new_tokens=10).ids == further
    assert fork.generate(max_new_tokens=10).ids == further


def test_overflow_reencodes(generator: TextGenerator) -> None:
    sample = generator.generate(
        PROMPTS[0],
        max_new_tokens=generator.config.n_ctx + 100,
        min_new_tokens=generator.config.n_ctx + 100,
        overflow="reencode",
        sampling=GREEDY,
    ).samples[0]
    assert sample.stats.reencoded > 0 and sample.stats.new_tokens == generator.config.n_ctx + 100
