"""The edge: verbs, help, and every error as one message and the right exit code."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smolora import __version__
from smolora.cli import main
from smolora.cli.terminal import open_terminal
from smolora.errors import StoppedBySignal

VERBS = {"demo", "doctor", "prepare", "pretrain", "plan", "train", "merge", "generate", "chat", "report"}
VERBS |= {"probe", "compare", "evaluate", "init", "config"}


def test_help_lists_exactly_the_verbs_that_exist(smolora):
    code, out, _ = smolora("--help")
    words = {word for line in out.splitlines() if line.startswith("│") for word in line.split()[1:2]}
    assert code == 0
    assert words >= VERBS
    assert not words & {"export", "serve"}


def test_no_arguments_show_the_help(smolora):
    assert smolora()[:2] == smolora("--help")[:2]


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_explains_itself_and_each_of_its_flags(smolora, verb):
    code, out, _ = smolora(verb, "--help")
    entries = [line.strip("│ *").split() for line in out.splitlines() if line.startswith("│")]
    assert code == 0
    assert not [entry for entry in entries if entry[:1] and entry[0].startswith("--") and len(entry) < 3]


def test_the_version_is_the_installed_one(smolora):
    assert smolora("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], 'Unknown command "trian". Did you mean "train"?'),
        (["train", "--modle", "x", "-o", "y"], "Unknown option: --modle. Did you mean --model?"),
        (["train", "--lerning-rate=1e-3"], "Unknown option: --lerning-rate=1e-3. Did you mean --lr?"),
        (["train", "--batchsize", "4"], "Unknown option: --batchsize. Did you mean --batch-size?"),
        (["train", "--learning-rate=1e-3"], "Unknown option: --learning-rate=1e-3. Did you mean --lr?"),
        (["pretrain", "--learning_rate", "1", "-o", "y"], "Unknown option: --learning_rate. Did you mean --lr?"),
        (["train", "--num_train_epochs=3"], "Unknown option: --num_train_epochs=3. Did you mean --epochs?"),
        (["train", "--output-dir", "y"], "Unknown option: --output-dir. Did you mean --out?"),
        (["train", "--num-epochs", "3"], "Unknown option: --num-epochs. Did you mean --epochs?"),
        (["train", "--lora-r=4"], "Unknown option: --lora-r=4. Did you mean --r?"),
        (["plan", "--max-seq-length", "9"], "Unknown option: --max-seq-length. Did you mean --max-length?"),
        (["train", "--base-model=m"], "Unknown option: --base-model=m. Did you mean --model?"),
        (["train", "--micro-batch-size=2"], "Did you mean training.per_device_train_batch_size=VALUE?"),
        (["train", "--load-in-4bit"], "Did you mean model.quantization=VALUE?"),
        (["pretrain", "--n-layer=2", "-o", "y"], "Unknown option: --n-layer=2. Did you mean --layers?"),
        (["pretrain", "--max-seq-length=9", "-o", "y"], "Did you mean --context?"),
        (["pretrain", "--max-length=9", "-o", "y"], "Did you mean --context?"),
        (["train", "--weight-decay", "0.1"], "Did you mean training.weight_decay=VALUE?"),
        (["pretrain", "--vocab-size", "99", "-o", "y"], "Did you mean tokenizer.vocab_size=VALUE?"),
        (["prepare", "d", "-o", "y", "--max-rejects", "3"], "Did you mean data.max_rejects=VALUE?"),
        (["train", "--steps", "3"], "Unknown option: --steps. Did you mean --max-steps?"),
        (["train", "--output=y"], "Unknown option: --output=y. Did you mean --out?"),
        (["train", "--batch", "3"], "Unknown option: --batch. Did you mean --batch-size?"),
        (["generate", "m", "p", "--max-tokens", "3"], "Unknown option: --max-tokens. Did you mean --max-new-tokens?"),
        (["train", "--lr", "fast", "-o", "y"], 'Invalid value for --lr: unable to convert "fast" into float.'),
        (["train", "--preset", "e2e"], "no preset 'e2e'. Did you mean 'e2e_mlp'?"),
        (["train", "--warmup-steps", "9"], "Did you mean training.warmup_steps=VALUE?"),
        (["generate", "model"], "smolora generate needs PROMPT. See smolora generate --help."),
        (["merge"], "smolora merge needs RUN. See smolora merge --help."),
        (["generate", "m", "p", "--top-k"], "smolora generate needs --top-k with a value."),
        (
            ["generate", "model", "prompt", "more"],
            "unexpected argument 'more'. Text of several words stands in quotes.",
        ),
        (
            ["generate", "m", "p", "--greedy", "--temperature", "2"],
            "--greedy and --temperature 2 contradict each other",
        ),
        (
            ["generate", "m", "p", "--greedy", "--seed", "1", "--top-k", "5"],
            "answers are greedy, so seed and top_k would change nothing: leave that out, or set a temperature above 0.",
        ),
        (
            ["chat", "m", "--temperature", "0", "--top-p", ".5"],
            "answers are greedy, so top_p would change nothing",
        ),
        (["generate", "m", "p", "--top-p", "3"], "top_p: input should be less than or equal to 1 (found 3.0)"),
        (["train", "--model", "m"], "-o is missing"),
        (["train", "--resume"], "-o is missing: the folder of the run, such as -o my-run."),
        (["plan", "--resume"], "-o is missing"),
        (["probe", "--model", "m", "--resume", "-o", "y"], "Unknown option"),
        (["train", "-o", "y"], "model.name_or_path is missing"),
        (["train", "--model", "m", "-o", "y", "trainin.seed=1"], "trainin: no such setting. Did you mean 'training'?"),
        (["train", "--model", "m", "-o", "y", "training.sed=1"], "training.sed: no such setting. Did you mean 'seed'?"),
        (
            ["train", "--model", "m", "-o", "y", "--overlong", "cut"],
            "data.overlong: input should be 'raise', 'truncate'",
        ),
        (["train", "none.yaml", "-o", "y"], "no configuration file none.yaml"),
        (["pretrain", "--data", "d", "-o", "y", "--heads", "3"], "gpt.num_heads must divide width, but 128"),
        (["pretrain", "--data", "d"], "smolora pretrain needs --out with a value."),
        (
            ["prepare", "d/01.txt", "d/02.txt", "-o", "y"],
            "unexpected 'd/02.txt': one source ('d/01.txt' was taken for it)",
        ),
        (
            ["prepare", "d", "-o", "y", "data.cunk_size=3"],
            "data.cunk_size: no such setting. Did you mean 'chunk_size'?",
        ),
    ],
)
def test_a_mistake_in_the_command_line_is_one_message_and_exit_2(smolora, arguments, message):
    code, out, err = smolora(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("smolora: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_flag_may_be_written_with_underscores(smolora):
    assert "training.max_steps: input should be" in smolora("train", "--model", "m", "-o", "y", "--max_steps", "0")[2]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["prepare", "nowhere.csv", "-o", "y"], 3, "no such file or folder: nowhere.csv"),
        (["train", "--model", "./nowhere", "--data", "d.csv", "-o", "y"], 4, "./nowhere is no folder"),
        (["generate", "./nowhere", "hello"], 4, "./nowhere is no folder"),
        (["chat", "./nowhere"], 4, "./nowhere is no folder"),
    ],
)
def test_what_isnt_there_is_named_with_its_exit_code(smolora, tmp_path, monkeypatch, arguments, exit_code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.csv").write_text("text\nhello\n")
    code, out, err = smolora(*arguments)
    assert (code, out) == (exit_code, "")
    assert message in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["d.csv"]


def test_what_isnt_there_is_named_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "d.csv").write_text("text\nhello\n")
    rest = ["--data", "nowhere.csv", "-o", "out"]
    lines = [[verb, "--model", "m", *rest] for verb in ("train", "probe", "plan", "init")] + [["pretrain", *rest]]
    lines += [["generate", "./nowhere", "hello"], ["chat", "./nowhere"], ["merge", "/nowhere"]]
    lines.append(["train", "--model", "./nowhere", "--data", "d.csv", "-o", "out"])
    lines += [["evaluate", "./nowhere", "--data", "d.csv"], ["evaluate", ".", "--data", "nowhere.csv"]]
    lines.append(["evaluate", "./nowhere"])
    script = (
        "import json, sys; from smolora.cli.app import run; "
        "print([run(line) for line in json.loads(sys.argv[1])], 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(lines)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == f"{[3] * 5 + [4] * 5 + [3, 2]} False\n"
    assert done.stderr.count("no such file or folder: nowhere.csv") == 6
    assert done.stderr.count("/nowhere is no folder. Name a model folder") == 5


class _Stdout(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self._error = error

    def write(self, text):
        raise self._error


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (KeyboardInterrupt(), 130, "smolora: error: interrupted."),
        (MemoryError(), 5, "smolora: error: out of memory"),
        (BrokenPipeError(), 0, ""),
        (StoppedBySignal("stopped by SIGINT after step 3."), 75, "smolora: stopped by SIGINT after step 3."),
    ],
)
def test_what_happens_to_the_process_has_its_exit_code(smolora, monkeypatch, error, exit_code, message):
    monkeypatch.setattr(sys, "stdout", _Stdout(error))
    code, _, err = smolora("doctor")
    assert code == exit_code
    assert err.startswith(message)
    assert "Traceback" not in err


def test_a_bug_shows_its_traceback_and_asks_for_a_report(smolora, monkeypatch):
    monkeypatch.setattr(sys, "stdout", _Stdout(ZeroDivisionError("1/0")))
    code, _, err = smolora("doctor")
    assert code == 1
    assert "Traceback" in err
    assert err.endswith("smolora: error: this is a bug in smolora. Please report it with the lines above.\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_exits_5_without_a_traceback():
    command = [sys.executable, "-m", "smolora", "config", "--for", "pretrain"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 5
    assert done.stderr == "smolora: error: [Errno 28] No space left on device. Free space, or choose another place.\n"


def test_a_reader_that_leaves_early_is_no_error():
    command = [sys.executable, "-m", "smolora.cli", "config", "--for", "pretrain"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.wait() == 0
        assert process.stderr.read() == ""


def test_an_error_that_nobody_reads_keeps_its_code():
    command = [sys.executable, "-c", "import sys; sys.stdin.read()\nfrom smolora.cli import main\nmain(['trian'])"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stderr.close()
        process.stdin.close()
    assert process.returncode == 2


def test_main_exits_with_the_code(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
    ids=["nothing", "another count", "a policy"],
)
def test_threads_that_wait_sleep_soon_unless_the_person_chose(monkeypatch, chosen, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    open_terminal()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_a_ctrl_c_when_all_is_said_leaves_no_traceback():
    script = (
        "import atexit, os, signal\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "from smolora.cli import main\n"
        "main(['--version'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == __version__


def test_a_ctrl_c_while_the_command_line_is_imported_leaves_no_traceback():
    script = (
        "import os, signal, sys\n"
        "class Impatient:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'cyclopts':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Impatient())\n"
        "from smolora.cli import main\n"
        "main(['--version'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "smolora: error: interrupted.\n")


def test_what_stdout_has_no_letters_for_is_spelt_out(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1", write_through=True))
    open_terminal()
    print("a \u2603 caf\xe9")
    assert written.getvalue() == b"a \\u2603 caf\xe9\n"
