"""evaluate, from the command line to the JSON and the files it promises."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pytest

FEW = ("--max-new-tokens", 4, "--num-samples", 3)


@pytest.fixture
def e2e(tmp_path):
    """Three inputs with four references, and predictions for them."""
    rows = ["mr,ref", "name[A],A is a pub.", "name[A],The pub is A.", "name[B],B is cheap.", "name[C],C is near D."]
    (tmp_path / "testset_w_refs.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "right.txt").write_text("A is a pub.\nB is cheap.\nC is near D.\n")
    return tmp_path


def test_predictions_give_one_json_object(smolora, e2e):
    command = ("evaluate", "--benchmark", "e2e_nlg", "--data-dir", e2e, "--json", "--predictions")
    code, out, _ = smolora(*command, e2e / "right.txt")
    found = json.loads(out)
    assert (code, found.keys(), found["num_rows"]) == (0, {"metrics", "details", "num_rows"}, 3)
    assert found["metrics"]["bleu"] == pytest.approx(100)
    assert found["details"]["bleu"].keys() == {"variant", "version", "low", "high", "reason"}
    assert "loss" not in found["metrics"]
    (e2e / "right.txt.gz").write_bytes(gzip.compress((e2e / "right.txt").read_bytes()))
    assert json.loads(smolora(*command, e2e / "right.txt.gz")[1]) == found


def test_predictions_are_scored_without_torch(e2e):
    arguments = ["evaluate", "--benchmark", "e2e_nlg", "--data-dir", str(e2e), "--predictions", str(e2e / "right.txt")]
    script = "import sys; from smolora.cli.app import run; print(run(sys.argv[1:]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n0 False\n")


def test_an_empty_line_is_an_empty_prediction(smolora, e2e):
    (e2e / "some.txt").write_text("A is a pub.\n\n\n")
    out = e2e / "kept"
    arguments = ("--predictions", e2e / "some.txt", "--benchmark", "e2e", "--data-dir", e2e, "-o", out)
    code, text, err = smolora("evaluate", *arguments)
    assert code == 0
    assert text.startswith("3 rows; in brackets")
    assert f"predictions: {out / 'predictions.jsonl'}" in err
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == ["A is a pub.", "", ""]
    assert smolora("evaluate", *arguments)[1] == text


@pytest.mark.parametrize("text", ["one\ntwo\n", "1\n2\n3\n4\n", ""])
def test_as_many_lines_as_rows_are_needed(smolora, e2e, text):
    (e2e / "few.txt").write_text(text)
    code, out, err = smolora("evaluate", "--predictions", e2e / "few.txt", "--benchmark", "e2e_nlg", "--data-dir", e2e)
    assert (code, out) == (3, "")
    assert f"has {text.count(chr(10))} lines, and e2e_nlg-test 3 rows" in err


def test_a_model_is_asked_the_rows_of_a_file(smolora, base, rows, tmp_path):
    arguments = ("--data", rows, "--prompt-field", "MR", "--completion-field", "ref", *FEW, "--json")
    code, out, err = smolora("evaluate", base, *arguments)
    found = json.loads(out)
    assert (code, found["num_rows"]) == (0, 3)
    assert found["metrics"].keys() >= {"bleu", "rouge1", "exact_match", "loss", "perplexity"}
    assert "predictions aren't kept" in err
    kept = smolora("evaluate", base, *arguments, "-o", tmp_path / "kept", "--quiet")
    assert json.loads(kept[1]) == found


def test_a_run_keeps_its_evaluations(smolora, base, rows, tmp_path):
    run = tmp_path / "run"
    fields = ("--prompt-field", "mr", "--completion-field", "ref")
    assert smolora("train", "--model", base, "--data", rows, *fields, "-o", run, "--max-steps", 1, "--quiet")[0] == 0
    code, out, _ = smolora("evaluate", run, "--data", rows, *FEW)  # The columns are those of the run.
    assert (code, "rougeLsum" in out) == (0, True)
    assert (run / "evaluation" / "rows-first-3" / "predictions.jsonl").is_file()
    again = smolora("evaluate", run, "--data", rows, *FEW)
    assert again[1] == out
    assert "rows 3/3" in again[2]


def test_rows_that_a_run_learned_from_are_counted_where_they_are_scored(smolora, base, rows, tmp_path):
    run = tmp_path / "run"
    fields = ("--prompt-field", "mr", "--completion-field", "ref")
    assert smolora("train", "--model", base, "--data", rows, *fields, "-o", run, "--max-steps", 1, "--quiet")[0] == 0
    for model in (run, run / "adapter_checkpoint"):
        code, out, err = smolora("evaluate", model, "--data", rows, *FEW, "-o", tmp_path / model.name)
        assert (code, out.startswith("3 rows, 3 of them learned from; in brackets")) == (0, True)
        assert "3 of 3 rows are among those that the model was given to learn from" in err
        assert json.loads((tmp_path / model.name / "evaluation.json").read_text())["num_trained_on"] == 3
    code, out, err = smolora("evaluate", base, "--data", rows, *fields, *FEW, "--json")
    assert (code, "num_trained_on" in out, "given to learn from" in err) == (0, False, False)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), (2, "name a model, or a file with --predictions")),
        (("m", "--predictions", "p.txt", "--benchmark", "squad"), (2, "one of the two")),
        (("m",), (2, "--benchmark NAME")),
        (("m", "--benchmark", "squad", "--data", "x.csv"), (2, "--benchmark NAME")),
        (("--predictions", "p.txt", "--data", "x.csv"), (2, "--predictions are of a benchmark's rows")),
        (("m", "--data", "x.csv", "--batch-size", 0), (2, "--batch-size must be at least 1")),
        (("m", "--data", "x.csv", "--num-samples=-1"), (2, "--num-samples must be at least 1")),
        (
            ("m", "--data", "x.csv", "--seed", 1),
            (2, "seed would change nothing: leave that out, or set a temperature above 0"),
        ),
        (("m", "--data", "x.csv", "--num-beams", 2, "--seed", 1), (2, "num_beams=2 looks for the likeliest answer")),
        (
            ("--predictions", "p.txt", "--benchmark", "sick", "--num-beams", 2),
            (2, "--num-beams would change nothing beside --predictions"),
        ),
        (("m", "--data", "x.csv", "--split", "train"), (2, "--split would change nothing beside --data")),
        (("m", "--benchmark", "squad", "--text-field", "x"), (2, "--text-field would change nothing beside")),
        (
            ("m", "--benchmark", "sick", "--by-likelihood", "--temperature", 1),
            (2, "--temperature would change"),
        ),
        (
            ("--predictions", "p.txt", "--benchmark", "sick", "--seed", 1, "--by-likelihood"),
            (2, "--by-likelihood, --seed would change nothing beside --predictions"),
        ),
        (
            ("--predictions", "p.txt", "--benchmark", "sick", "--base", "b"),
            (2, "--base would change nothing beside --predictions"),
        ),
        (("m", "--benchmark", "squid", "--data-dir", "."), (2, "Did you mean 'squad'")),
        (("m", "--benchmark", "squad", "--data-dir", "none"), (3, "no folder none with one of dev-v1.1.json")),
        (("no-such-model", "--data", "no-such-file.csv"), (4, "no-such-model")),
    ],
)
def test_what_cant_be_evaluated_is_said(smolora, arguments, expected, hub):
    code, out, err = smolora("evaluate", *arguments)
    assert (code, out) == (expected[0], "")
    assert expected[1] in err


def test_a_persons_predictions_stay_where_they_are(smolora, e2e):
    out = e2e / "kept"
    out.mkdir()
    file = (e2e / "right.txt").rename(out / "predictions.jsonl")
    command = ("evaluate", "--benchmark", "e2e_nlg", "--data-dir", e2e, "-o", out, "--predictions")
    code, _, err = smolora(*command, file)
    assert (code, "Choose another folder with -o" in err) == (2, True)
    assert file.read_text().startswith("A is a pub.")
    (e2e / "others.txt").write_bytes(file.read_bytes())
    assert smolora(*command, e2e / "others.txt")[0] == 2
    assert file.read_text().startswith("A is a pub.")


def test_missing_predictions_and_bad_bytes_are_3(smolora, e2e):
    command = ("evaluate", "--benchmark", "e2e_nlg", "--data-dir", e2e, "--predictions")
    assert smolora(*command, e2e / "none.txt")[0] == 3
    (e2e / "bytes.txt").write_bytes(b"a\n\xff\nb\n")
    code, _, err = smolora(*command, e2e / "bytes.txt")
    assert (code, "bytes.txt:2" in err) == (3, True)
