"""report, from the command line to the files it promises."""

from __future__ import annotations

import pytest

from smolora.records.run_dir import RunDir
from tests.run_folders import write_run

FIELDS = ("--prompt-field", "mr", "--completion-field", "ref")


@pytest.mark.usefixtures("painted_reports")
def test_report_prints_the_summary_and_writes_the_page(smolora, tmp_path):
    run = RunDir(write_run(tmp_path / "run", phases=(("both", 4), ("mlp", 8))))
    code, out, err = smolora("report", run.path)
    assert code == 0
    assert out.startswith("run\n\nWhat was trained\n- base with lora")
    assert err == f"report: {run.report}\n"
    assert run.report.is_file()


def test_report_of_several_runs_needs_a_folder(smolora, tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    code, out, err = smolora("report", *runs)
    assert (code, out) == (2, "")
    assert "-o is missing" in err
    code, out, _ = smolora("report", *runs, "-o", tmp_path / "both")
    assert code == 0
    assert [line for line in out.splitlines() if line in ("1  a", "2  b")] == ["1  a", "2  b"]
    assert (tmp_path / "both" / "report.html").is_file()


@pytest.mark.parametrize(("arguments", "expected"), [((), (2, "no run was named")), (("no",), (3, "no holds no run"))])
def test_report_of_nothing_is_said(smolora, arguments, expected):
    code, out, err = smolora("report", *arguments)
    assert (code, out) == (expected[0], "")
    assert expected[1] in err


@pytest.mark.usefixtures("painted_reports")
def test_train_ends_with_a_report(smolora, base, rows, tmp_path):
    run = RunDir(tmp_path / "run")
    code, _, err = smolora("train", "--model", base, "--data", rows, *FIELDS, "--max-steps", 2, "-o", run.path)
    assert code == 0
    assert f"report: {run.report}" in err
    assert (run.plots / "training_loss.png").is_file()


def test_pretrain_ends_with_a_report(smolora, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log.\n" * 40)
    shape = ("--layers", 1, "--heads", 2, "--width", 16, "--context", 16)
    run = RunDir(tmp_path / "run")
    code, _, _ = smolora("pretrain", "--data", text, "-o", run.path, *shape, "--max-steps", 3, "--batch-size", 2)
    assert code == 0
    assert run.report.is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.yaml"], "no configuration file a.yaml"),
        (["{one}"], "two configurations at least, found 1"),
        (["{one}", "{other}"], "two configurations are named 'one', and names become folders"),
        (["--ray", "auto", "--workers", "2"], "--ray and --workers both say where runs go"),
    ],
)
def test_compare_refuses_what_is_no_comparison(smolora, base, rows, tmp_path, words, message):
    files = {"one": tmp_path / "one.yaml", "other": tmp_path / "b" / "one.yaml"}
    for file in files.values():
        file.parent.mkdir(exist_ok=True)
        file.write_text(_configuration(base, rows, completion="ref"))
    code, out, err = smolora("compare", *[word.format(**files) for word in words], "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert message in err


def test_compare_names_a_column_that_is_not_there(smolora, base, rows, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(_configuration(base, rows, completion="reff"))
    code, _, err = smolora("compare", tmp_path / "one.yaml", tmp_path / "two.yaml", "-o", tmp_path / "out")
    assert code == 3
    assert "no column 'reff'. Did you mean 'ref'?" in err


def _configuration(base, rows, *, completion):
    fields = f"prompt_field: mr, completion_field: {completion}"
    return f"model: {{name_or_path: {base}}}\ndata: {{sources: [{rows}], {fields}}}\n"
