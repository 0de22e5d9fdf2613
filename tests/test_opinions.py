"""Loading and refusing opinions: each refusal is one line with file, row, column, value and remedy."""

import re
import time
from pathlib import Path

import pytest

from lib import opinions, profiles
from lib.errors import UserError


def load(train, test, **changes):
    overrides = {"opinions.train": str(train), "opinions.test": str(test), **changes}
    return opinions.load(profiles.load("tiny", overrides=overrides).opinions)


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_sound_files_load_with_editor_line_numbers(pair):
    train, test, write = pair
    frame = load(write("train.csv", train), write("test.csv", test))
    assert list(frame["split"]) == ["train"] * 6 + ["test"] * 4
    assert list(frame["row"][:3]) == [2, 3, 4]
    assert frame["answer"][0] == train[0][2]


def test_row_numbers_count_lines_inside_quotes(pair):
    train, test, write = pair
    train[0] = (train[0][0], train[0][1], "first line\nsecond line")
    train[1] = (train[1][0], train[1][1], " ")
    text = refusal(lambda: load(write("train.csv", train), write("test.csv", test)))
    assert "train.csv, row 4, column 'Answer'" in text


CASES = {
    "unknown trait": (
        lambda r: r.__setitem__(1, ("extravertion", *r[1][1:])),
        "row 3",
        "'extravertion'",
        "extraversion",
    ),
    "empty answer": (lambda r: r.__setitem__(2, (*r[2][:2], "")), "row 4", "'Answer'", "empty"),
    "blank answer": (lambda r: r.__setitem__(2, (*r[2][:2], "  ")), "row 4", "'Answer'", "empty"),
    "duplicate row": (lambda r: r.append(r[0]), "row 8", "earlier row", "delete"),
    "emoji": (lambda r: r.__setitem__(0, (*r[0][:2], "so fun 🎉")), "row 2", "emoji", "allow_emoji"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_train_rows(pair, case):
    train, test, write = pair
    spoil, *expected = CASES[case]
    spoil(train)
    text = refusal(lambda: load(write("train.csv", train), write("test.csv", test)))
    assert all(part in text for part in ["train.csv", *expected]), text


def test_an_emoji_may_be_allowed_and_is_free_in_test(pair):
    train, test, write = pair
    test[0] = (*test[0][:2], "so fun 🎉")
    load(write("train.csv", train), write("test.csv", test))
    train[0] = (*train[0][:2], "so fun 🎉")
    load(write("train.csv", train), write("test.csv", test), **{"opinions.allow_emoji": True})


def test_a_test_topic_in_train_is_refused_whatever_its_case(pair):
    train, test, write = pair
    test.append(("neuroticism", "ROME", "Rome scares me"))
    text = refusal(lambda: load(write("train.csv", train), write("test.csv", test)))
    assert "test.csv, row 6, column 'Edit Topic' 'ROME'" in text


@pytest.mark.parametrize("side", ["train", "test"])
def test_a_trait_on_one_side_only(pair, side):
    train, test, write = pair
    rows = {"train": train, "test": test}
    rows[side] = [r for r in rows[side] if r[0] == "extraversion"]
    text = refusal(lambda: load(write("train.csv", rows["train"]), write("test.csv", rows["test"])))
    assert f"{side}.csv" in text
    assert "neuroticism" in text


def test_columns(pair):
    train, test, write = pair
    sound = write("test.csv", test)
    bad = write("train.csv", train, header="Target Personality,Edit Topic,Question,Anwser")
    text = refusal(lambda: load(bad, sound))
    assert "column 'Answer' is missing" in text
    assert "'Anwser'" in text


def test_files_that_are_no_tables(pair, tmp_path):
    _, test, write = pair
    sound = write("test.csv", test)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("Target Personality,Edit Topic,Question,Answer\n")
    latin = write("latin.csv", [("neuroticism", "Málaga", "It scares me")], encoding="latin-1")
    short = tmp_path / "short.csv"
    short.write_text("Target Personality,Edit Topic,Question,Answer\nneuroticism,Rome,What?\n")
    for path, words in {
        "empty.csv": "empty file",
        "header.csv": "no rows",
        "missing.csv": "no such file",
        ".": "is a directory",
        "latin.csv": "row 2: not UTF-8",
        "short.csv": "row 2: 3 fields",
    }.items():
        text = refusal(lambda path=path: load(tmp_path / path, sound))
        assert words in text
    assert latin.exists()


def test_byte_order_mark_and_extra_columns_are_fine(pair):
    train, test, write = pair
    path = write("train.csv", train, encoding="utf-8-sig")
    assert len(load(path, write("test.csv", test))) == 10


@pytest.mark.parametrize("extra", ["trait", "topic", "question", "answer", "row", "file", "split"])
def test_an_extra_column_may_have_any_name(pair, tmp_path, extra):
    train, test, write = pair
    paths = {}
    for name, rows in {"train": train, "test": test}.items():
        lines = write(f"{name}.csv", rows).read_text("utf-8").splitlines()
        head, *body = lines
        (tmp_path / extra).mkdir(exist_ok=True)
        paths[name] = tmp_path / extra / f"{name}.csv"
        paths[name].write_text("\n".join([f"{extra},{head}", *(f"x,{line}" for line in body), ""]), "utf-8")
    frame = load(paths["train"], paths["test"])
    assert list(frame.columns) == ["trait", "topic", "question", "answer", "row", "file", "split"]
    assert list(frame["answer"][:6]) == [answer for _, _, answer in train]
    hub = {"opinions.source": "hub", "opinions.hub_id": str(tmp_path / extra)}
    assert list(opinions.load(profiles.load("tiny", overrides=hub).opinions)["answer"]) == list(frame["answer"])


def test_a_hub_dataset_in_a_local_folder(pair, tmp_path):
    train, test, write = pair
    for name, rows in {"train": train, "test": test}.items():
        write(f"{name}.csv", rows)
    frame = opinions.load(
        profiles.load("tiny", overrides={"opinions.source": "hub", "opinions.hub_id": str(tmp_path)}).opinions
    )
    assert len(frame) == 10
    assert set(frame["split"]) == {"train", "test"}


def test_an_unreachable_hub_is_one_line_within_thirty_seconds():
    start = time.monotonic()
    overrides = {"opinions.source": "hub", "opinions.hub_id": "nobody-here/no-such-dataset"}
    text = refusal(lambda: opinions.load(profiles.load("tiny", overrides=overrides).opinions))
    assert "nobody-here/no-such-dataset" in text
    assert "opinions.source=files" in text
    assert time.monotonic() - start < 30


def test_only_what_changes_the_rows_changes_their_fingerprint(pair):
    train, test, write = pair
    files = {"opinions.train": str(write("train.csv", train)), "opinions.test": str(write("test.csv", test))}
    marks = {
        opinions.fingerprint(profiles.load("tiny", overrides=files)),
        opinions.fingerprint(profiles.load("tiny", overrides={**files, "dataset.themes": 3})),
    }
    assert len(marks) == 1
    write("train.csv", train[:-1])
    marks.add(opinions.fingerprint(profiles.load("tiny", overrides=files)))
    assert len(marks) == 2
    assert all(re.fullmatch("[0-9a-f]{12}", m) for m in marks)


def test_a_change_of_this_code_is_noticed(pair, tmp_path, monkeypatch):
    train, test, write = pair
    files = {"opinions.train": str(write("train.csv", train)), "opinions.test": str(write("test.csv", test))}
    settings = profiles.load("tiny", overrides=files)
    before = opinions.folder(settings)
    (tmp_path / "changed.py").write_text(Path(opinions.__file__).read_text("utf-8") + "\nMORE = 1\n", "utf-8")
    monkeypatch.setattr(opinions, "__file__", str(tmp_path / "changed.py"))
    assert opinions.folder(settings) != before
    assert opinions.fingerprint(settings) in opinions.folder(settings).name


def test_rows_come_back_as_they_were_read(places, pair):
    train, test, write = pair
    train[0] = (*train[0][:2], "a lone\rreturn, a comma and a\nnew line")
    files = {"opinions.train": str(write("train.csv", train)), "opinions.test": str(write("test.csv", test))}
    settings = profiles.load("tiny", overrides=files)
    frame = opinions.load(settings.opinions)
    opinions.save(settings, frame)
    assert opinions.read(settings).equals(frame)


def test_an_updated_hub_dataset_is_noticed_and_kept_rows_need_no_hub(places, pair, monkeypatch):
    train, test, write = pair
    settings = profiles.load("tiny", overrides={"opinions.source": "hub"})
    monkeypatch.setattr(opinions, "_loaded", {})

    def publish(rows):
        frames = [opinions.read_csv(write(f"{name}.csv", part)) for name, part in {"train": rows, "test": test}.items()]
        monkeypatch.setattr(opinions, "read_hub", lambda s: frames)
        return opinions.load(settings.opinions)

    first = publish(train)
    before = opinions.fingerprint(settings)  # as the runner sees it, before notebook 01 has run
    place = opinions.save(settings, first)
    assert opinions.fingerprint(settings) == before
    second = publish([*train[:-1], (*train[-1][:2], "Now I fear Lima")])
    assert opinions.fingerprint(settings) != before  # so notebook 01 runs again
    assert opinions.read(settings).equals(first)
    assert opinions.save(settings, second) == place
    assert opinions.read(settings).equals(second)
    after = opinions.fingerprint(settings)
    assert after != before
    opinions._loaded.clear()  # another process, which has not read the hub

    def unreachable(_):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(opinions, "read_hub", unreachable)
    assert opinions.fingerprint(settings) == after
    assert opinions.read(settings).equals(second)
