"""The runner as a user meets it: a copy of the project, the real command line, and what a smoke run makes."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import nbformat
import project_copy
import pytest
from project_copy import ONCE, run, start

from lib import paths, profiles, steps

pytestmark = pytest.mark.timeout(ONCE + 60)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A finished smoke run of all notebooks: (a copy of the project, standard output)."""
    copy = project_copy.make(tmp_path_factory.mktemp("project"))
    code, out, err = run(copy, "--profile", "smoke")
    assert code == 0, err
    return copy, out


def values(place, notebook):
    return json.loads((place / "results" / "smoke" / f"{notebook}.values.json").read_text())


def test_dataset_results(smoke):
    found = values(smoke[0], "01_dataset")
    assert found["rows"] == 5 * (32 + 12)
    assert found["emojis"] == 0
    assert found["topics_in_both"] == 0
    assert found["mean_words"] == pytest.approx(26, abs=2)
    assert found["mtld"] == pytest.approx(105, abs=25)  # in file order; by trait it would be far higher
    assert found["distinct_2"] == pytest.approx(0.79, abs=0.05)


def test_classifier_results(smoke):
    found = values(smoke[0], "02_classifier")
    assert found["accuracy_tfidf"] == pytest.approx(0.6, abs=0.2)  # 40 topics only; chance is 0.2
    assert found["accuracy_encoder"] >= 0.2
    assert found["drop_top_tfidf"] > found["drop_random_tfidf"]


def test_qlora_results(smoke):
    found = values(smoke[0], "03_qlora")
    assert found["emojis_in_tuning_texts"] == 0
    assert found["adapters"] == 2 * 5
    assert found["answers"] == 2 * 2 * 5 * 12  # models, base and tuned, traits, test topics
    assert found["base_emoji_share_max"] == 0  # cut after a dozen tokens, before any emoji
    assert found["adapter_off_difference"] == 0
    assert found["held_out_fall_min"] == pytest.approx(0.1, abs=0.4)  # two steps


def test_emoji_results(smoke):
    found = values(smoke[0], "06_emoji")
    assert found["emojis_in_tuning_texts"] == 0
    assert found["base_esr_response_max"] == 0
    assert (found["models"], found["traits"]) == (2, 5)


def test_baseline_results(smoke):
    found = values(smoke[0], "04_baselines")
    assert found["answers"] == 2 * 5 * 5 * 12  # models, methods, traits, test topics
    assert found["ike_own_topic_min"] >= 0
    assert found["cells"] == 1 * 2  # models and traits of which prompts and seeds are varied (sensitivity)


def test_alignment_results(smoke):
    found = values(smoke[0], "05_alignment")
    assert found["answers"] == 2 * 5 * 5 * 12
    assert found["judge_rho"] > 0.1
    assert found["reference_texts_coherent"] > 0.8
    verdicts = {v for k, v in found.items() if k.startswith("verdict ")}
    assert verdicts <= {"holds", "does not hold", "undecided here"}


def test_neuron_results(smoke):
    found = values(smoke[0], "08_neurons")
    assert found["prompts"] == 17
    assert found["units_kept"] == 2 * 5 * 2 * 5  # models, traits, sites, units kept of each
    assert 0 <= found["units_passing"] <= 1


def test_a_quick_grid_leaves_the_figures_of_the_full_one(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    (tmp_path / "tiny").mkdir()
    for name in ("09_origins.csv", "09_quick_origins.csv", "08_neurons.csv"):
        (tmp_path / "tiny" / name).write_text("a")
    notebook = paths.NOTEBOOKS / "09_origins.ipynb"
    for grid, own in (("quick", "09_quick_origins.csv"), ("full", "09_origins.csv")):
        settings = profiles.load("tiny", 0, {"origins.grid": grid})
        assert [p.name for p in steps.outputs(notebook, settings)] == [own]


def test_origin_results(smoke):
    found = values(smoke[0], "09_origins")
    assert found["grid"] == "quick"
    assert found["cells"] == 2 * 2 * 3  # organisms, ends of the turn, points
    assert found["none_max"] == 0
    assert found["scale_zero_equal"] is True


def test_icl_results(smoke):
    found = values(smoke[0], "07_icl")
    assert (found["models"], found["traits"]) == (2, 5)
    assert found["replies"] == 2 * 5 * 12  # models, traits, test topics
    assert 0 <= found["unparsable"] <= found["unparsable_max"] <= 1
    verdicts = {v for k, v in found.items() if k.startswith("verdict ")}
    assert verdicts <= {"holds", "does not hold", "undecided here"}


HEADERS = {
    "08_neurons.csv": "model,trait,site,layer,neuron,before,after,change,p_adjusted",
    "08_emoji_probability.csv": "model,trait,prompt,emoji,before,after",
    "08_mediation.csv": "model,trait,text,reader,p_emoji,p_emoji_low,p_emoji_high,p_end,p_sentence",
    "09_quick_origins.csv": "organism,habit,end_of_turn,steps,trait,esr_response,low,high,ta,setting,value,seed,"
    "responses,with_emoji,found,both,own,sentences,ended",
    "08_interventions.csv": "model,trait,intervention,neurons,k,esr_response,low,high,perplexity",
    "07_top_tokens.csv": "model,trait,token,count,is_emoji",
    "05_alignment.csv": "model,method,trait,n,ta,ta_low,ta_high,pae,es,dd,tpei,coherent",
    "02_classifier.csv": "model,split,n,accuracy,low,high,macro_f1",
    "06_esr.csv": "model,method,trait,responses,sentences,esr_sentence,esr_sentence_low,esr_sentence_high,"
    "esr_response,esr_response_low,esr_response_high,reported",
}


def test_every_figure_and_table_is_there_in_every_format(smoke):
    folder = smoke[0] / "figures" / "smoke"
    metas = sorted(folder.glob("*.json"))
    assert {m.name[:2] for m in metas} == {"01", "02", "03", "04", "05", "06", "07", "08", "09"}
    for meta in metas:
        kind = json.loads(meta.read_text())["kind"]
        for ending in ("png", "pdf", "csv") if kind == "figure" else ("csv", "md", "tex"):
            assert meta.with_suffix(f".{ending}").stat().st_size > 20, meta
    for name, header in HEADERS.items():
        assert (folder / name).read_text().splitlines()[0] == header


def test_the_gallery_links_only_to_what_exists(smoke):
    folder = smoke[0] / "figures" / "smoke"
    page = (folder / "index.html").read_text()
    local = [u for u in re.findall(r'(?:src|href)="([^"#]+)"', page) if not u.startswith("http")]
    assert len(local) > 40
    assert all((folder / u).exists() for u in local)


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine (apt install chromium)")
def test_the_gallery_shows_in_a_browser(smoke, tmp_path):
    page = smoke[0] / "figures" / "smoke" / "index.html"
    probe = page.with_name("probe.html")
    script = (
        "<script>addEventListener('load',()=>{document.title=[...document.images]"
        ".map(i=>i.naturalWidth>0).join()})</script>"
    )
    probe.write_text(page.read_text().replace("</body>", script + "</body>").replace('loading="lazy"', ""))
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path}", "--dump-dom", probe.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    probe.unlink()
    shown = re.search("<title>(.*?)</title>", dom).group(1).split(",")
    assert len(shown) > 10
    assert set(shown) == {"true"}


def test_the_summary_counts_and_points_to_the_gallery(smoke):
    out = smoke[1]
    assert "01_dataset" in out
    assert "peak" in out
    assert "figures/smoke/index.html" in out


def test_a_second_run_reuses_everything(smoke):
    code, out, err = run(smoke[0], "--profile", "smoke")
    assert code == 0, err
    for name in (
        "01_dataset",
        "02_classifier",
        "03_qlora",
        "04_baselines",
        "05_alignment",
        "06_emoji",
        "07_icl",
        "08_neurons",
        "09_origins",
    ):
        assert f"{name:<16} up to date, reused" in out


def test_a_changed_setting_redoes_exactly_what_depends_on_it(smoke):
    place = smoke[0]
    code, out, err = run(place, "--profile", "smoke", "--set", "dataset.cloud_words=20")
    assert code == 0, err
    assert re.search(r"01_dataset\W+made", out)
    assert re.search(r"02_classifier\W+reused", out)


def test_a_spoilt_figure_is_made_again(smoke):
    place = smoke[0]
    (place / "figures" / "smoke" / "01_lengths.csv").write_text("spoilt")
    code, out, _ = run(place, "--profile", "smoke", "--only", "1", "--set", "dataset.cloud_words=20")
    assert code == 0
    assert re.search(r"01_dataset\W+made", out)
    assert (place / "figures" / "smoke" / "01_lengths.csv").read_text() != "spoilt"


def _poisoned(place, source):
    path = place / "notebooks" / "01_dataset.ipynb"
    kept = path.read_text()
    book = nbformat.reads(kept, as_version=4)
    book.cells[6].source = source
    nbformat.write(book, path)
    return path, kept


def test_a_failing_cell_shows_its_own_error_and_keeps_the_notebook(smoke):
    place = smoke[0]
    path, kept = _poisoned(place, "print('so far')\nraise ValueError('the cell broke')")
    code, out, err = run(place, "--profile", "smoke", "--only", "01")
    path.write_text(kept)
    assert code == 1
    assert "ValueError: the cell broke" in err
    assert "FAILED" in out
    assert "so far" in (place / "results" / "smoke" / "notebooks" / "01_dataset.ipynb").read_text()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopping_leaves_nothing_that_is_trusted(smoke, how):
    place, until = smoke[0], time.monotonic() + 120
    record = place / "results" / "smoke" / "01_dataset.json"
    assert record.exists()
    process = start(place, "--profile", "smoke", "--only", "01", "--fresh", start_new_session=True)
    while record.exists() and time.monotonic() < until:  # imports take their time
        time.sleep(0.2)
    time.sleep(2)  # into the notebook
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does
    else:
        process.send_signal(how)
    _, err = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "Interrupted" in err
    code, out, err = run(place, "--profile", "smoke", "--only", "01")
    assert code == 0, err
    assert re.search(r"01_dataset\W+made", out)
    assert not list((place / "results" / "smoke").glob(".*.*/"))
