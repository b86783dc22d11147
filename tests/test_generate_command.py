"""python -m runtime.generate: text on stdout and nothing else, one line on stderr for what went wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime import SamplingOptions, TextGenerator
from runtime.generate import main

ROOT = Path(__file__).parent.parent
PROMPT = "Once upon a time"


def command(*arguments: str | Path, **popen: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "runtime.generate", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        **popen,
    )


def run(*arguments: str | Path, stdin: bytes = b"") -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command, in a process of its own."""
    with command(*arguments) as process:
        out, err = process.communicate(stdin, timeout=60)
    return process.returncode, out.decode("utf-8"), err.decode("utf-8")


@pytest.fixture(scope="module")
def generator(demo_int8: Path) -> TextGenerator:
    return TextGenerator.load(demo_int8)


def expected(generator: TextGenerator, prompt: str, max_new_tokens: int, **options: Any) -> str:
    return generator.generate(prompt, max_new_tokens=max_new_tokens, sampling=SamplingOptions(**options)).text


# In a process of its own


def test_stdout_holds_the_text_alone_and_stderr_nothing(demo_int8: Path, generator: TextGenerator) -> None:
    result = run(demo_int8, PROMPT, "--max-new-tokens", "12", "--seed", "3")
    assert result == (0, expected(generator, PROMPT, 12, seed=3) + "\n", "")


def test_a_dash_reads_the_prompt_from_standard_input(demo_int8: Path, generator: TextGenerator) -> None:
    result = run(demo_int8, "-", "--max-new-tokens", "8", "--seed", "3", stdin="“Yes,”\nsaid he".encode())
    assert result == (0, expected(generator, "“Yes,”\nsaid he", 8, seed=3) + "\n", "")


def test_standard_input_that_is_no_utf8_is_refused_in_one_line(demo_int8: Path) -> None:
    status, out, err = run(demo_int8, "-", stdin=b"caf\xe9 noir")
    assert (status, out) == (2, "")
    assert err == ("error: standard input: byte 3 is no UTF-8 (invalid continuation byte); convert it to UTF-8 first\n")


def test_interactive_answers_line_by_line(demo_int8: Path, generator: TextGenerator) -> None:
    status, out, err = run(
        demo_int8, "--interactive", "--greedy", "--max-new-tokens", "5", stdin=f"{PROMPT}\n\nThe old\r\n".encode()
    )
    answers = [expected(generator, prompt, 5, do_sample=False) + "\n" for prompt in (PROMPT, "The old")]
    assert (status, out, err) == (0, "".join(answers), "prompt >>> " * 4 + "\n")


def test_interactive_goes_on_after_a_prompt_that_is_too_long(demo_int8: Path, generator: TextGenerator) -> None:
    typed = f"{'word ' * 1000}\n{PROMPT}\n"
    status, out, err = run(demo_int8, "--interactive", "--greedy", "--max-new-tokens", "5", stdin=typed.encode())
    assert (status, out) == (0, expected(generator, PROMPT, 5, do_sample=False) + "\n")
    assert "do not fit the model's context of 512; shorten the prompt" in err


def test_ctrl_c_ends_with_130_and_one_line(demo_int8: Path) -> None:
    with command(demo_int8, "--interactive") as process:
        assert process.stderr is not None
        assert process.stderr.read(len("prompt >>> ")) == b"prompt >>> "
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, b"", b"error: interrupted\n")


def test_a_reader_that_leaves_early_is_no_error(demo_int8: Path) -> None:
    with command(demo_int8, PROMPT, "--max-new-tokens", "300", "--seed", "1") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 0)


def test_bad_usage_is_one_line_and_status_2(demo_int8: Path) -> None:
    status, out, err = run(demo_int8, "--no-such-option")
    assert (status, out) == (2, "")
    assert err == (
        "python -m runtime.generate: unrecognized arguments: --no-such-option; see python -m runtime.generate --help\n"
    )


def test_another_device_is_refused_with_status_2(demo_int8: Path) -> None:
    status, out, err = run(demo_int8, PROMPT, "--device", "tensorrt")
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert "was made for cpu, asked for tensorrt" in err
    assert err.count("\n") == 1


def test_a_copied_runtime_works_under_another_name(demo_int8: Path, generator: TextGenerator, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "runtime", tmp_path / "edge_text", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "edge_text.generate", demo_int8, PROMPT, "--greedy", "--max-new-tokens", "5"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "utf-8"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        expected(generator, PROMPT, 5, do_sample=False) + "\n",
        "",
    )


# In this process, which is faster


def test_json_is_one_object_with_the_samples(demo_int8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--num-return-sequences", "2", "--seed", "5", "--max-new-tokens", "6", "--json"]
    assert main([str(demo_int8), "“Yes,”", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"prompt_ids", "seed", "samples", "truncated", "receipt"}
    assert result["seed"] == 5
    assert len(result["samples"]) == 2
    for sample in result["samples"]:
        assert set(sample) == {"text", "ids", "finish_reason", "stats", "logprobs", "beam_score"}
        assert set(sample["stats"]) == {
            "prompt_tokens",
            "new_tokens",
            "ttft_ms",
            "decode_tokens_per_s",
            "itl_ms",
            "reencoded",
            "speculation",
        }
        assert len(sample["ids"]) == 6


def test_json_and_text_are_of_the_same_generation(
    demo_int8: Path, generator: TextGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(demo_int8), PROMPT, "--seed", "4", "--max-new-tokens", "10", "--json"])
    assert json.loads(capsys.readouterr().out)["samples"][0]["text"] == expected(generator, PROMPT, 10, seed=4)


def test_statistics_go_to_stderr(demo_int8: Path, generator: TextGenerator, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(demo_int8), PROMPT, "--seed", "4", "--max-new-tokens", "10", "--stats"])
    printed = capsys.readouterr()
    assert printed.out == expected(generator, PROMPT, 10, seed=4) + "\n"
    assert "prompt tokens, first token" in printed.err
    assert "seed 4" in printed.err
    assert "receipt: asked for cpu; nodes: " in printed.err


def test_several_samples_are_told_apart(demo_int8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(demo_int8), PROMPT, "--seed", "4", "--max-new-tokens", "5", "--num-return-sequences", "3"])
    out = capsys.readouterr().out
    assert [f"SAMPLE {number} " in out for number in (1, 2, 3, 4)] == [True, True, True, False]


def test_no_prompt_writes_out_of_nothing(
    demo_int8: Path, generator: TextGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(demo_int8), "--seed", "8", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == expected(generator, "", 5, seed=8) + "\n"


# A file of prompts


def answers(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_a_file_of_prompts_is_answered_line_by_line(demo_int8: Path, generator: TextGenerator, tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    lines = [PROMPT, '{"prompt": "The old", "max_new_tokens": 4, "seed": 9, "num_return_sequences": 2}', "", "“Yes,”"]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    status, out, err = run(demo_int8, "--prompts", file, "--batch", "2", "--seed", "3", "--max-new-tokens", "6")
    assert (status, err) == (0, "")
    result = answers(out)
    assert [answer["index"] for answer in result] == [0, 1, 2, 3]
    assert [answer["seed"] for answer in result] == [3, 9, 5, 6]
    assert [len(answer["samples"]) for answer in result] == [1, 2, 1, 1]
    assert [answer["samples"][0]["text"] for answer in result] == [
        expected(generator, PROMPT, 6, seed=3),
        expected(generator, "The old", 4, seed=9),
        expected(generator, "", 6, seed=5),
        expected(generator, "“Yes,”", 6, seed=6),
    ]


def test_prompts_may_come_from_standard_input(demo_int8: Path, generator: TextGenerator) -> None:
    status, out, _ = run(demo_int8, "--prompts", "-", "--greedy", "--max-new-tokens", "5", stdin=PROMPT.encode())
    assert status == 0
    assert answers(out)[0]["samples"][0]["text"] == expected(generator, PROMPT, 5, do_sample=False)


def test_a_bad_line_is_answered_by_its_error_and_the_others_go_on(
    demo_int8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts"
    file.write_bytes(b'a\ncaf\xe9\n{"prompt": "b", "topk": 3}\n' + b"word " * 600 + b"\nb\n")
    assert main([str(demo_int8), "--prompts", str(file), "--max-new-tokens", "3"]) == 2
    printed = capsys.readouterr()
    result = answers(printed.out)
    assert [answer["index"] for answer in result] == [0, 1, 2, 3, 4]
    assert [set(answer) == {"index", "error"} for answer in result] == [False, True, True, True, False]
    assert "do not fit the model's context of 512" in result[3]["error"]
    assert printed.err == f"error: {file}: 3 of 5 lines failed, the first is line 2: {result[1]['error']}\n"


def test_answers_as_ready_name_their_lines(demo_int8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts"
    file.write_text("".join(f'{{"prompt": "a", "max_new_tokens": {tokens}}}\n' for tokens in (30, 2, 9)))
    assert main([str(demo_int8), "--prompts", str(file), "--as-ready", "--greedy"]) == 0
    assert [answer["index"] for answer in answers(capsys.readouterr().out)] == [1, 2, 0]


def test_a_file_that_is_not_there_is_one_line_and_status_2(
    demo_int8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(demo_int8), "--prompts", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'absent'}: cannot be read: No such file or directory; name a file of prompts\n"
    )


def test_text_beyond_the_context_goes_on_if_it_is_asked_to(demo_int8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-new-tokens", "600", "--overflow", "reencode", "--seed", "1", "--json"]
    assert main([str(demo_int8), PROMPT, *options]) == 0
    (sample,) = json.loads(capsys.readouterr().out)["samples"]
    assert sample["stats"]["reencoded"] == (1 if sample["finish_reason"] == "length" else 0)


def test_a_deadline_is_the_finish_reason(demo_int8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(demo_int8), PROMPT, "--deadline-ms", "1e-6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"][0]["finish_reason"] == "deadline"


def test_options_replace_the_packages_own(
    demo_int8: Path, generator: TextGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"seed": 1, "temperature": 0.7, "top_k": 5, "top_p": 0.9}
    spelled = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    main([str(demo_int8), PROMPT, "--max-new-tokens", "20", *spelled])
    assert capsys.readouterr().out == expected(generator, PROMPT, 20, **options) + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "0"], r"temperature is 0.0, expected a finite number above 0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-k", "-1"], "top_k is -1"),
        (["--top-p", "1.5"], "top_p is 1.5"),
        (["--seed", "-3"], "seed is -3"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0, expected a whole number above 0"),
        (["--max-new-tokens", "512"], "do not fit the model's context of 512; shorten the prompt or ask for at most 5"),
        (["--num-return-sequences", "0"], "num_return_sequences is 0"),
        (["--deadline-ms", "0"], "deadline_ms is 0.0, expected a number of milliseconds above 0"),
        (["--threads", "0"], "threads is 0, expected a whole number from 1 to"),
    ],
)
def test_a_value_out_of_range_is_one_line_and_status_2(
    demo_int8: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main([str(demo_int8), PROMPT, *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--greedy", "--temperature", "1"], "--greedy takes no --temperature;"),
        (["--greedy", "--seed", "0"], "--greedy takes no"),
        (["a prompt", "--interactive"], "--interactive takes no PROMPT and no --json"),
        (["--interactive", "--json"], "--interactive takes no PROMPT and no --json"),
        (["--batch", "2"], "--batch and --as-ready are for --prompts FILE"),
        (["--as-ready"], "--batch and --as-ready are for --prompts FILE"),
        (["a", "--num-beams", "2", "--draft", "b"], "--draft and --prefix-cache-bytes do nothing for --num-beams"),
        (["a", "--num-beams", "2", "--prefix-cache-bytes", "9"], "--draft and --prefix-cache-bytes do nothing for"),
        (["a prompt", "--prompts", "file"], "--prompts takes no PROMPT, --interactive, --json or --stats"),
        (["--prompts", "file", "--stats"], "--prompts takes no PROMPT, --interactive, --json or --stats"),
        (["--max-new-tokens", "many"], "invalid int value: 'many'"),
        (["--device", "tpu"], "device 'tpu', expected cpu, cuda, tensorrt"),
    ],
)
def test_options_that_contradict_are_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "absent"), *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_no_package_is_refused_with_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent"), PROMPT]) == 2
    assert "no such folder; name one, or make it of a checkpoint with: python -m export.convert" in (
        capsys.readouterr().err
    )


def test_more_samples_than_memory_holds_end_with_status_1(demo_int8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(demo_int8), PROMPT, "--num-return-sequences", "1000000000"]) == 1
    assert "no memory for a cache" in capsys.readouterr().err
