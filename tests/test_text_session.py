"""TextSession: however a session came to its tokens, it goes on bit for bit in the same way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime import RequestError, SamplingOptions, TextGenerator, TextSession
from runtime.decoder import CHUNK_TOKENS
from runtime.prefix_cache import PrefixCache

from .sessions import IDS, N_NEW, PROMPT, SEED, SetAt, begun, next_logits, replayed

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def fp32(demo_fp32: Path) -> TextGenerator:
    return TextGenerator.load(demo_fp32)


@pytest.fixture(scope="module")
def int8(demo_int8: Path) -> TextGenerator:
    return TextGenerator.load(demo_int8)


@pytest.fixture(scope="module")
def int8_cache(demo_int8_kv8: Path) -> TextGenerator:
    return TextGenerator.load(demo_int8_kv8)


@pytest.fixture(scope="module", params=["fp32", "int8", "int8_cache"])
def generator(request: pytest.FixtureRequest) -> TextGenerator:
    chosen: TextGenerator = request.getfixturevalue(request.param)
    return chosen


# The law


@settings(max_examples=60, deadline=None)
@given(
    prompt_length=st.sampled_from([0, 1, 2, 3, 50, 127, 128, 129, 200]),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 5)),
            st.tuples(st.just("generate"), st.integers(1, 5)),
            st.tuples(st.just("cancel"), st.integers(1, 4)),
            st.tuples(st.just("rewind"), st.floats(0, 1)),
            st.tuples(st.just("fork"), st.none()),
            st.tuples(st.just("save"), st.none()),
        ),
        min_size=1,
        max_size=8,
    ),
)
def test_what_comes_next_depends_on_the_tokens_and_not_on_the_way_to_them(
    int8: TextGenerator,
    tmp_path_factory: pytest.TempPathFactory,
    prompt_length: int,
    steps: list[tuple[str, Any]],
) -> None:
    session = begun(int8, IDS[:prompt_length])
    for number, (verb, argument) in enumerate(steps):
        if verb == "append":
            session.append(IDS[10 * number : 10 * number + argument])
        elif verb == "generate":
            session.generate(max_new_tokens=argument, min_new_tokens=argument)
        elif verb == "cancel":
            session.generate(max_new_tokens=5, min_new_tokens=5, cancel=SetAt(argument))
        elif verb == "rewind":
            session.rewind(round(argument * len(session.ids)))
        elif verb == "fork":
            session = session.fork()
        else:
            path = tmp_path_factory.getbasetemp() / "session.npz"
            session.save(path)
            session = TextSession.restore(int8, path)
    fresh = replayed(session)
    assert fresh.ids == session.ids
    assert np.array_equal(next_logits(session), next_logits(fresh))


@pytest.mark.parametrize("sampling", [SEED, SamplingOptions.greedy()], ids=["sampled", "greedy"])
def test_a_session_writes_what_the_generator_writes(generator: TextGenerator, sampling: SamplingOptions) -> None:
    """From the same logits, bit for bit."""
    seen: list[NDArray[np.float32]] = []

    def keep(_ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(logits.copy())
        return logits

    whole = generator.generate(PROMPT, max_new_tokens=N_NEW, sampling=sampling, logits_processor=keep).samples[0]
    sample = begun(generator, sampling=sampling).generate(max_new_tokens=N_NEW, logits_processor=keep)
    assert (sample.text, sample.ids, sample.finish_reason) == (whole.text, whole.ids, whole.finish_reason)
    assert np.array_equal(seen[: len(seen) // 2], seen[len(seen) // 2 :])


def test_a_text_may_be_written_in_two_parts_at_every_split(generator: TextGenerator) -> None:
    whole = begun(generator).generate(max_new_tokens=N_NEW).ids
    for split in range(1, N_NEW):
        session = begun(generator)
        parts = [session.generate(max_new_tokens=n).ids for n in (split, N_NEW - split)]
        assert (*parts[0], *parts[1]) == whole


@pytest.mark.parametrize("length", [2, 3, 50, 128, 129, 130, 257, 300])
def test_rewind_then_append_is_fresh_at_every_cut(generator: TextGenerator, length: int) -> None:
    """Bit for bit, though the cut leaves a token alone before it or behind it."""
    fresh = next_logits(begun(generator, IDS[:length]))
    for cut in sorted({0, 1, 2, length // 2, length - 2, length - 1}):
        session = begun(generator, [*IDS[:cut], *IDS[300:340]])
        session.generate(max_new_tokens=3, min_new_tokens=3)
        session.rewind(cut)
        session.append(IDS[cut:length])
        assert session.ids == tuple(IDS[:length])
        assert np.array_equal(next_logits(session), fresh)


def test_what_is_appended_token_by_token_is_one_prompt(generator: TextGenerator) -> None:
    session = TextSession(generator, sampling=SEED)
    for token_id in IDS[:10]:
        session.append([token_id])
        next_logits(session)
    assert np.array_equal(next_logits(session), next_logits(begun(generator, IDS[:10])))


# Another process


RESTORE = """
import json, sys
from runtime import TextGenerator, TextSession
generator = TextGenerator.load(sys.argv[1])
for path in sys.argv[2:]:
    session = TextSession.restore(generator, path)
    print(json.dumps([session.ids, session.generate(max_new_tokens=8, min_new_tokens=8).ids]))
"""


def test_a_session_saved_at_any_token_goes_on_in_a_new_process(generator: TextGenerator, tmp_path: Path) -> None:
    """Before, within and behind what was generated; and after more was appended, run or not."""
    session, paths, expected = TextSession(generator, sampling=SEED), [], []

    def save() -> None:
        paths.append(tmp_path / f"{len(paths)}.npz")
        session.save(paths[-1])
        ids = session.ids or (generator.config.eos_token_id,)  # what an empty session begins with
        expected.append([list(ids), list(session.fork().generate(max_new_tokens=8, min_new_tokens=8).ids)])

    save()
    session.append(PROMPT)
    save()
    for _ in session.stream(max_new_tokens=N_NEW, min_new_tokens=N_NEW):
        save()
    session.append(" and")
    save()
    session.generate(max_new_tokens=2)
    save()
    session.rewind(len(session.ids) - 4)
    save()
    program = [sys.executable, "-c", RESTORE, str(generator.package.folder), *map(str, paths)]
    result = subprocess.run(program, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    restored = [json.loads(line) for line in result.stdout.splitlines()]
    assert [ids for _, ids in restored] == [ids for _, ids in expected]
    assert [ids for ids, _ in restored][1:] == [ids for ids, _ in expected][1:]
    assert len(paths) > N_NEW // 2


# Forks


def test_a_fork_and_its_origin_go_their_own_ways(generator: TextGenerator) -> None:
    alone = begun(generator)
    expected = (*alone.generate(max_new_tokens=6).ids, *alone.generate(max_new_tokens=6).ids)
    session = begun(generator)
    first = session.generate(max_new_tokens=6).ids
    fork = session.fork()
    fork.append(" But then, in the morning")
    fork.generate(max_new_tokens=6)
    fork.rewind(2)
    assert (*first, *session.generate(max_new_tokens=6).ids) == expected
    assert fork.ids == session.ids[:2]


def test_samples_of_a_session_are_those_of_a_request(fp32: TextGenerator) -> None:
    samples = fp32.generate(PROMPT, max_new_tokens=12, sampling=SEED, num_return_sequences=3).samples
    session = begun(fp32)
    assert [session.fork(sample=n).generate(max_new_tokens=12).ids for n in range(3)] == [s.ids for s in samples]


def test_sampling_may_change_on_the_way(fp32: TextGenerator) -> None:
    session = begun(fp32)
    session.generate(max_new_tokens=5)
    given = session.ids
    session.sampling = SamplingOptions.greedy()
    assert session.generate(max_new_tokens=5).ids == (
        fp32.generate(given, max_new_tokens=5, sampling=SamplingOptions.greedy()).samples[0].ids
    )


def test_a_seed_is_drawn_once(fp32: TextGenerator) -> None:
    session = begun(fp32, sampling=None)
    seed = session.sampling.seed
    assert seed is not None
    assert session.fork().sampling.seed == session.sampling.seed == seed


def test_after_an_end_of_text_a_fork_goes_on_as_the_session(demo_int8: Path) -> None:
    generator = TextGenerator.load(demo_int8)
    end = generator.config.eos_token_id
    for seed in range(12):
        session = TextSession(generator, sampling=SamplingOptions(seed=seed))
        session.append("It was a dark and stormy night")
        written = len(session.ids) + 5

        def ends(ids: Sequence[int], logits: NDArray[np.float32], at: int = written) -> NDArray[np.float32]:
            if len(ids) == at:
                logits[:] = -np.inf
                logits[end] = 0
            return logits

        assert session.generate(max_new_tokens=9, logits_processor=ends).finish_reason == "stop"
        fork = session.fork()
        first: list[NDArray[np.float32]] = []

        def keep(_ids: Sequence[int], logits: NDArray[np.float32], kept: list[Any] = first) -> NDArray[np.float32]:
            kept.append(logits.copy())
            return logits

        for each in (session, fork):
            each.append(" and then the dog")
            each.generate(max_new_tokens=1, logits_processor=keep)
        assert np.array_equal(*first)


# What is run


def test_only_what_is_new_is_run(fp32: TextGenerator) -> None:
    session = begun(fp32, IDS[:100])
    runs: list[int] = []
    append = session._decoding.append

    def watched(row: int, ids: NDArray[np.int64], **options: Any) -> Iterator[NDArray[np.float32]]:
        runs.append(len(ids))
        return append(row, ids, **options)

    session._decoding.append = watched  # type: ignore[method-assign]
    session.generate(max_new_tokens=3, min_new_tokens=3)
    session.append(IDS[:5])
    assert session.generate(max_new_tokens=2, min_new_tokens=2).stats.prompt_tokens == 1 + 5
    session.rewind(50)
    session.generate(max_new_tokens=1)
    assert runs == [100, 1, 1, 1 + 5, 1, 2]  # the last token is run when the next is wanted, a given one in a pair


def test_a_prompt_that_was_cancelled_is_gone_on_with_where_it_stands(generator: TextGenerator) -> None:
    """After the first of its pieces, with and without a cache of prefixes, which keeps whole prompts alone."""
    expected = begun(generator, IDS).generate(max_new_tokens=5)
    cache = PrefixCache(generator.decoder, max_bytes=1 << 26)
    for session in (begun(generator, IDS), begun(generator, IDS, prefix_cache=cache)):
        sample = session.generate(max_new_tokens=5, cancel=SetAt(2))
        assert (sample.finish_reason, sample.ids, session.ids) == ("cancelled", (), tuple(IDS))
        again = session.generate(max_new_tokens=5)
        assert again.ids == expected.ids
        assert again.stats.prompt_tokens == len(IDS) - CHUNK_TOKENS
    assert cache.held_bytes == 0


def test_a_prefix_cache_changes_nothing_but_the_work(generator: TextGenerator) -> None:
    cache = PrefixCache(generator.decoder, max_bytes=1 << 24)
    expected = next_logits(begun(generator, IDS[:120]))
    for session in (begun(generator, IDS[:120], prefix_cache=cache) for _ in range(2)):
        assert np.array_equal(next_logits(session), expected)
    assert cache.reused_tokens == 112


def test_the_generators_prefix_cache_is_the_sessions_too(demo_int8: Path) -> None:
    cached = TextGenerator.load(demo_int8, prefix_cache_bytes=1 << 24)
    for _ in range(2):
        next_logits(begun(cached, IDS[:120]))
    assert cached.prefix_cache is not None and cached.prefix_cache.reused_tokens == 112


def test_another_generators_prefix_cache_is_refused(fp32: TextGenerator, demo_int8: Path) -> None:
    cache = PrefixCache(TextGenerator.load(demo_int8).decoder, max_bytes=1 << 24)
    with pytest.raises(RequestError, match="holds another generator's keys and values"):
        TextSession(fp32, prefix_cache=cache)
