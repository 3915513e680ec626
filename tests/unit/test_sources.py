"""Every kind of source gives the same pixels and labels; what is hostile or damaged is one clear error."""

import io
import os
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import source_files as make
from image_files import encoded, of_every_kind, pixels

from data_prep import archives, cifar, shards
from data_prep.images import ImageError
from data_prep.kinds import open_source, read_classes, reopen
from data_prep.manifest import load_manifest
from data_prep.scan import index_source, scan
from data_prep.sources import Entries, Entry, Names
from data_prep.verify import check_seal, verify
from data_prep.workers import MAX_CHUNK, chunks
from data_prep.write import write
from pipeline.config import UserError
from pipeline.data import open_loader

DATA = os.environ.get("PATCHMILL_DATA")


@pytest.fixture(scope="module")
def images() -> make.Images:
    """Five classes, some images of every kind, real ones where they are at hand."""
    kinds = of_every_kind()
    found: make.Images = {"n01": {}, "n02": {}, "n03": kinds, "n04": {}, "n05": {}}
    for k in range(24):
        label = f"n0{(1, 2, 4, 5)[k % 4]}"
        found[label][f"{label}_{k}.JPEG"] = encoded(pixels(300 + k, 40 + k, 36), "JPEG", quality=92)
    if DATA:
        with tarfile.open(Path(DATA) / "imagenet_samples.tar") as tar:
            for member in [m for m in tar.getmembers() if m.isreg()][:40]:
                file = tar.extractfile(member)
                assert file is not None
                found[f"n0{1 + len(member.name) % 5}"][Path(member.name).name] = file.read()
    return found


@pytest.fixture(scope="module")
def sources(images, tmp_path_factory) -> dict[str, tuple[Path, Path | None]]:
    """Kind -> (source, development kit)."""
    folder = tmp_path_factory.mktemp("sources")
    return {
        "folder": (make.as_folder(folder / "folder", images), None),
        "tar": (make.as_tar(folder / "plain.tar", images), None),
        "tar of tars": (make.as_tar_of_tars(folder / "ILSVRC2012_img_train.tar", images), None),
        "validation": make.as_validation(folder, images),
        "parquet": (make.as_parquet(folder / "parquet", images), None),
        "webdataset": (make.as_webdataset(folder / "webdataset", images), None),
    }


def facts(manifest: Path) -> list[tuple[str, int, int]]:
    book = load_manifest(manifest)
    digests = [row.tobytes().hex() for row in book.pixel_sha256]
    return sorted(zip(digests, book.labels.tolist(), book.num_bytes.tolist(), strict=True))


@pytest.mark.parametrize("kind", ["tar", "tar of tars", "validation", "parquet", "webdataset"])
def test_the_same_images_from_every_source(kind, images, sources, tmp_path):
    make_names = tmp_path / "names.txt"
    make_names.write_text("\n".join(sorted(images)))
    path, devkit = sources[kind]
    report = scan(sources["folder"][0], tmp_path / "folder.jsonl", workers=1)
    source = open_source(path, devkit=devkit)
    index = index_source(source, read_classes(make_names), None)
    found = scan(source, tmp_path / "m.jsonl", workers=2, index=index)
    assert found.num_samples == sum(map(len, images.values())) and not found.num_quarantined
    assert facts(tmp_path / "m.jsonl") == facts(tmp_path / "folder.jsonl")
    assert load_manifest(tmp_path / "m.jsonl").classes == tuple(sorted(images))
    if kind.startswith("tar"):  # names and order too
        assert found.image_set == report.image_set
        assert list(load_manifest(tmp_path / "m.jsonl").paths) == list(load_manifest(tmp_path / "folder.jsonl").paths)


def test_each_manifest_leads_back_to_the_bytes(sources, tmp_path):
    """A beton from it is the same, byte for byte of every sample, as one from the folder."""
    stored = {}
    for kind, (path, devkit) in sources.items():
        scan(open_source(path, devkit=devkit), tmp_path / "m.jsonl", workers=0)
        write(tmp_path / "m.jsonl", tmp_path / f"{kind}.beton", workers=2)
        verify(tmp_path / f"{kind}.beton", workers=1)
        seal = check_seal(tmp_path / f"{kind}.beton")
        stored[kind] = sorted(zip(seal.crcs.tolist(), seal.labels.tolist(), seal.widths.tolist(), strict=True))
    assert len(stored) == 6 and all(rows == stored["folder"] for rows in stored.values())


@pytest.mark.parametrize("kind", ["folder", "tar", "tar of tars", "validation", "webdataset"])
def test_the_folder_loader_reads_every_source_that_allows_it(kind, images, sources, tmp_path):
    path, devkit = sources[kind]
    scan(open_source(path, devkit=devkit), tmp_path / "m.jsonl", workers=0)
    book = load_manifest(tmp_path / "m.jsonl")
    loader = open_loader("folder", tmp_path / "m.jsonl", image_size=8, seed=0, threads=2, augment=False)
    with loader.batches(iter([(0, np.arange(book.num_samples))])) as batches:
        batch = next(batches)
    assert batch.labels.tolist() == book.labels.tolist() and batch.images.shape[0] == sum(map(len, images.values()))


def test_the_folder_loader_refuses_shards_that_are_read_as_wholes(sources, tmp_path):
    scan(sources["parquet"][0], tmp_path / "m.jsonl", workers=0)
    with pytest.raises(UserError, match=r"parquet shards.*prep write"):
        open_loader("folder", tmp_path / "m.jsonl", image_size=8, seed=0, threads=1, augment=False)


def small_pixels(count: int) -> np.ndarray:
    return np.stack([pixels(700 + k, 32, 32) for k in range(count)])


def test_cifar_from_its_archive(tmp_path):
    shown, labels = small_pixels(20), [k % 3 for k in range(20)]
    make.as_cifar(tmp_path / "cifar-10-python.tar.gz", shown, labels, ["plane", "car", "bird"], batches=4)
    for split, part in (("train", slice(0, 15)), ("test", slice(15, 20))):
        source = open_source(tmp_path / "cifar-10-python.tar.gz", split=split)
        assert scan(source, tmp_path / f"{split}.jsonl", workers=2).num_samples == len(labels[part])
        book = load_manifest(tmp_path / f"{split}.jsonl")
        assert book.classes == ("plane", "car", "bird") and book.labels.tolist() == labels[part]
        write(tmp_path / f"{split}.jsonl", tmp_path / f"{split}.beton", mode="raw", workers=0)
        seal = check_seal(tmp_path / f"{split}.beton")
        file = (tmp_path / f"{split}.beton").read_bytes()
        stored = [file[row["ptr"] : row["ptr"] + row["size"]] for row in seal.table]
        assert stored == [image.tobytes() for image in shown[part]]
    with pytest.raises(UserError, match=r"data_batch_1.*--split train or --split test"):
        scan(tmp_path / "cifar-10-python.tar.gz", tmp_path / "x.jsonl", workers=0)


def test_cifars_pickles_are_what_numpy_reads(tmp_path):
    rows = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    data = make.py2_pickle({b"data": rows, b"labels": [1, 2]})
    real = pickle.loads(data, encoding="bytes")
    assert np.array_equal(real[b"data"], rows)
    ours = cifar._load(io.BytesIO(data))
    assert np.array_equal(ours[b"data"].images().reshape(2, 3072), rows) and ours[b"labels"] == [1, 2]


@pytest.mark.parametrize(
    ("hostile", "words"),
    [
        (b"\x80\x02cos\nsystem\nU\x0cecho hostile\x85R.", "it names os.system"),
        (b"\x80\x02cbuiltins\neval\nU\x051 + 1\x85R.", "it names builtins.eval"),
        (b"\x80\x02cnumpy.core.multiarray\nfromfile\nU\x01x\x85R.", "it names numpy.core.multiarray.fromfile"),
        (pickle.dumps(Path("x"), protocol=2), "it names pathlib.PosixPath"),
        (b"\x80\x02]q\x00.", "is no dictionary"),
        (b"\x80\x02}q\x00U", ""),
        (b"garbage", ""),
        (b"", ""),
    ],
    ids=["os.system", "eval", "numpy", "object", "list", "cut short", "garbage", "empty"],
)
def test_a_hostile_or_damaged_pickle_is_an_error_and_runs_nothing(hostile, words, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("ran"))
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as tar:
        make.add(tar, "cifar-10-batches-py/data_batch_1", hostile)
    with pytest.raises(UserError, match=f"cifar.tar.gz: data_batch_1 is not CIFAR's or damaged: {words}"):
        open_source(tmp_path / "cifar.tar.gz", split="train")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({b"labels": [1]}, "1 labels for 2 images"),
        ({b"labels": [1, -1]}, "labels for 2 images"),
        ({b"data": np.zeros((2, 3000), np.uint8)}, "instead of u1"),
        ({b"data": np.zeros((2, 3072), np.int16)}, "instead of u1"),
        ({b"data": b"no array"}, "damaged"),
    ],
)
def test_a_batch_that_is_not_cifars_is_refused(change, words, tmp_path):
    content = {b"labels": [0, 1], b"data": np.zeros((2, 3072), np.uint8)} | change
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as tar:
        make.add(tar, "data_batch_1", make.py2_pickle(content))
    with pytest.raises(UserError, match=words):
        open_source(tmp_path / "cifar.tar.gz", split="train")


def test_bombs_are_refused(images, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 2000)
    monkeypatch.setattr(shards, "MAX_FILE_BYTES", 2000)
    large = sum(len(data) > 2000 for files in images.values() for data in files.values())
    for kind in ("tar", "tar of tars", "webdataset", "parquet"):
        report = scan(sources[kind][0], tmp_path / "m.jsonl", workers=0)
        assert report.reasons == {"too large": large} and report.num_samples == sum(map(len, images.values())) - large
    monkeypatch.setattr(shards, "MAX_ROW_GROUP", 1000)
    with pytest.raises(UserError, match="unpacks to more than 1000 bytes"):
        scan(sources["parquet"][0], tmp_path / "m.jsonl", workers=0)
    monkeypatch.setattr(cifar, "MAX_MEMBER", 100)
    make.as_cifar(tmp_path / "c.tar.gz", small_pixels(4), [0] * 4, ["a"])
    with pytest.raises(UserError, match="more than any of CIFAR"):
        open_source(tmp_path / "c.tar.gz", split="train")
    monkeypatch.setattr(archives, "MAX_TEXT", 10)
    with pytest.raises(UserError, match="is not the development kit"):
        open_source(sources["validation"][0], devkit=sources["validation"][1])


@pytest.mark.parametrize("name", ["../../etc/x.jpg", "/etc/x.jpg", "a/../../x.jpg"])
@pytest.mark.parametrize("inner", [False, True])
def test_a_path_that_leads_out_refuses_the_archive(name, inner, tmp_path):
    data = encoded(pixels(1), "JPEG")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        make.add(tar, "a/good.jpg", data)
        if inner:
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w") as class_tar:
                make.add(class_tar, name, data)
            make.add(tar, "b.tar", file.getvalue())
        else:
            make.add(tar, name, data)
    with pytest.raises(UserError, match="leads out of the archive"):
        scan(tmp_path / "x.tar", tmp_path / "m.jsonl", workers=0)
    assert sorted(os.listdir(tmp_path)) == ["x.tar"]


def test_a_file_that_is_in_a_tar_twice_and_one_that_is_cut_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        make.add(tar, "a/x.jpg", encoded(pixels(1), "JPEG"))
        make.add(tar, "a/x.jpg", encoded(pixels(2), "JPEG"))
    with pytest.raises(UserError, match="holds a/x.jpg twice"):
        scan(tmp_path / "x.tar", tmp_path / "m.jsonl", workers=0)
    size = (tmp_path / "x.tar").stat().st_size
    with pytest.raises(ImageError, match="cut short: 5 bytes of 9"):
        archives.ImageTar(tmp_path / "x.tar").read("a/x.jpg", size - 5, 9)


def test_several_tars_in_one_file_are_refused(images, tmp_path):
    data = make.as_tar(tmp_path / "x.tar", images).read_bytes()
    for rest in (data, b"garbage"):
        (tmp_path / "x.tar").write_bytes(data + rest)
        with pytest.raises(UserError, match="goes on behind its end"):
            scan(tmp_path / "x.tar", tmp_path / "m.jsonl", workers=0)
    (tmp_path / "x.tar").write_bytes(data + bytes(3 * 2**20))
    assert scan(tmp_path / "x.tar", tmp_path / "m.jsonl", workers=0).num_samples == sum(map(len, images.values()))


@pytest.mark.parametrize(
    ("label", "words"), [(b"50000000", "name so many classes with --classes"), (b"9" * 20, "not a number")]
)
def test_a_label_beyond_all_classes_is_an_error(label, words, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        make.add(tar, "a.cls", label)
        make.add(tar, "a.jpg", encoded(pixels(1), "JPEG"))
    with pytest.raises(UserError, match=words):
        scan(tmp_path / "x.tar", tmp_path / "m.jsonl", workers=0)


def test_links_devices_and_hidden_files_of_a_tar_are_no_images(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        make.add(tar, "a/good.jpg", encoded(pixels(1), "JPEG"))
        make.add(tar, "a/link.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        make.add(tar, "a/hard.jpg", b"", type=tarfile.LNKTYPE, linkname="a/good.jpg")
        make.add(tar, "a/pipe.jpg", b"", type=tarfile.FIFOTYPE)
        make.add(tar, "a/._good.jpg", b"a Mac's")
        make.add(tar, "readme.txt", b"text")
    report = scan(tmp_path / "x.tar", tmp_path / "m.jsonl", workers=0)
    assert report.num_samples == 1
    assert report.reasons == {"cannot be read": 3, "outside the class folders": 1}


@pytest.mark.parametrize("kind", ["tar", "tar of tars", "validation", "webdataset", "parquet"])
def test_an_archive_that_is_cut_or_overwritten_is_refused_or_its_images_are_named(kind, sources, tmp_path):
    """Wherever it is cut: never a smaller set without a word."""
    path, devkit = sources[kind]
    whole = path if path.is_file() else sorted(path.iterdir())[0]
    data, rng = whole.read_bytes(), random.Random(0)
    end = len(data.rstrip(b"\0"))  # what follows in a tar is its end mark and filling
    for cut in [1, 300, 512, 1024, end - 1, *(rng.randrange(end) for _ in range(12))]:
        broken = tmp_path / whole.name
        broken.write_bytes(data[:cut])
        with pytest.raises(UserError) as error:
            scan(open_source(broken, devkit=devkit), tmp_path / "m.jsonl", workers=0)
        assert str(broken) in str(error.value) and "\n" not in str(error.value)
    if kind != "parquet":
        place = data.index(b"ustar", len(data) // 2) - 257  # the header of a member in the middle
        broken.write_bytes(data[:place] + b"\xff" * 512 + data[place + 512 :])
        with pytest.raises(UserError, match="damaged or cut short"):
            scan(open_source(broken, devkit=devkit), tmp_path / "m.jsonl", workers=0)


def test_a_shard_that_changed_after_the_scan_is_named(sources, tmp_path):
    for kind in ("tar", "webdataset", "parquet"):
        path = sources[kind][0]
        copy = tmp_path / path.name
        copy.mkdir() if path.is_dir() else None
        for item in sorted(path.iterdir()) if path.is_dir() else [path]:
            (copy / item.name if path.is_dir() else copy).write_bytes(item.read_bytes())
        scan(copy, tmp_path / "m.jsonl", workers=0)
        first = sorted(copy.iterdir())[0] if copy.is_dir() else copy
        first.write_bytes(first.read_bytes()[:3000])
        with pytest.raises(UserError, match=r"(cut short|changed|damaged|cannot be read).*scan again with"):
            write(tmp_path / "m.jsonl", tmp_path / f"{kind}.beton", workers=0)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda p: (p / "x.tar").write_bytes(b""), "is neither a folder, a tar"),
        (lambda p: make.as_tar(p / "x.tar", {"a": {}}), "holds no image file in a class folder"),
        (lambda p: tarfile.open(p / "x.tar", "w:bz2").close(), "is no archive|holds no batch of CIFAR"),
        (lambda p: (p / "x.tar").write_bytes(b"\x1f\x8b" + bytes(50)), "cannot be read|is no archive"),
    ],
)
def test_a_file_that_is_no_source_is_one_clear_error(build, words, tmp_path):
    build(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        scan(tmp_path / "x.tar", tmp_path / "m.jsonl", workers=0)
    assert str(tmp_path / "x.tar") in str(error.value)


def test_options_that_do_not_fit_the_source_are_refused(sources, tmp_path):
    with pytest.raises(UserError, match="--split train: goes with CIFAR's archives only"):
        open_source(sources["tar"][0], split="train")
    with pytest.raises(UserError, match="--devkit .*: goes with ILSVRC2012_img_val.tar only"):
        open_source(sources["folder"][0], devkit=tmp_path)
    with pytest.raises(UserError, match="add --devkit ILSVRC2012_devkit_t12.tar.gz"):
        open_source(sources["validation"][0])
    with pytest.raises(UserError, match="the development kit cannot be read"):
        open_source(sources["validation"][0], devkit=tmp_path / "none.tar.gz")
    with pytest.raises(UserError, match="which this version does not know"):
        reopen("zip", tmp_path)


def test_validation_images_without_a_label_or_missing_ones_are_refused(images, tmp_path):
    val, devkit = make.as_validation(tmp_path, images)
    with tarfile.open(tmp_path / "less.tar", "w") as tar:
        for number in (1, 2):
            make.add(tar, f"ILSVRC2012_val_{number:08d}.JPEG", b"x")
    with pytest.raises(UserError, match="holds 2 validation images, the ground truth of .* [0-9]+"):
        scan(open_source(tmp_path / "less.tar", devkit=devkit), tmp_path / "m.jsonl", workers=0)
    assert val.exists()


def test_a_folder_in_a_tar_and_splits_taken_for_classes(images, tmp_path):
    both = {
        "train": {f"{c}/{f}": data for c, files in images.items() for f, data in files.items()},
        "val": {"n01/x.png": b"x"},
    }
    make.as_tar(tmp_path / "x.tar", both)
    make.as_folder(tmp_path / "train", images)
    report = scan(tmp_path / "x.tar" / "train", tmp_path / "m.jsonl", workers=0)
    assert report.image_set == scan(tmp_path / "train", tmp_path / "f.jsonl", workers=0).image_set
    write(tmp_path / "m.jsonl", tmp_path / "m.beton", workers=0)
    make.as_folder(tmp_path / "val", {"n01": {"x.jpg": b"x"}})
    for source in (tmp_path / "x.tar", tmp_path):
        with pytest.raises(
            UserError, match=f"holds train, val and not a folder a class; name one of them: {source}/train"
        ):
            scan(source, tmp_path / "m.jsonl", workers=0)
    with pytest.raises(UserError, match="x.tar/test: holds no image file"):
        scan(tmp_path / "x.tar" / "test", tmp_path / "m.jsonl", workers=0)


def test_shards_are_picked_by_a_pattern_and_splits_are_not_mixed(images, tmp_path):
    make.as_parquet(tmp_path / "data", images)
    for shard in sorted((tmp_path / "data").iterdir()):
        shard.with_name(shard.name.replace("train", "validation")).write_bytes(shard.read_bytes())
    with pytest.raises(
        UserError, match=r"shards of train, validation; name those of one, such as '.*/train-\*.parquet'"
    ):
        scan(tmp_path / "data", tmp_path / "m.jsonl", workers=0)
    count = sum(map(len, images.values()))
    assert scan(tmp_path / "data" / "train-*.parquet", tmp_path / "m.jsonl", workers=0).num_samples == count
    with pytest.raises(UserError, match="stands for no file"):
        scan(tmp_path / "data" / "tarin-*.parquet", tmp_path / "m.jsonl", workers=0)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"picture": [b"x"], "label": [0]}, "the image column should be called image or img or jpg"),
        ({"image": [b"x"], "class": [0]}, "the label column should be called"),
        ({"image": [b"x"], "label": ["cat"]}, "of type string, not integers"),
        ({"image": [b"x"], "label": [-1]}, "hold no row with a label"),
    ],
)
def test_parquet_of_another_layout_is_refused(columns, words, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=words):
        scan(tmp_path / "x.parquet", tmp_path / "m.jsonl", workers=0)


def test_rows_without_bytes_or_label_are_listed(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = encoded(pixels(1), "JPEG")
    table = pa.table({"image": [good, None, good], "label": pa.array([0, 0, None], pa.int32())})
    pq.write_table(table, tmp_path / "x.parquet")
    report = scan(tmp_path / "x.parquet", tmp_path / "m.jsonl", workers=0)
    assert report.num_samples == 1 and report.reasons == {"cannot be read": 1, "no label": 1}
    assert load_manifest(tmp_path / "m.jsonl").classes == ("0",)


def test_webdataset_samples_without_an_image_or_a_label_are_listed(tmp_path):
    image = encoded(pixels(1), "JPEG")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, data in (("0.cls", b"1"), ("0.jpg", image), ("1.jpg", image), ("2.cls", b"0"), ("3.jpg", image)):
            make.add(tar, name, data)
        make.add(tar, "3.cls", b"cat")
        make.add(tar, "4.jpg", image)
        make.add(tar, "4.png", image)
        make.add(tar, "4.cls", b"0")
    report = scan(tmp_path / "s.tar", tmp_path / "m.jsonl", workers=0)
    assert report.num_samples == 1 and report.reasons == {
        "no label": 2,
        "the sample has 0 images": 1,
        "the sample has 2 images": 1,
    }
    assert load_manifest(tmp_path / "m.jsonl").classes == ("0", "1")


def test_the_class_index_is_explicit(images, sources, tmp_path):
    index = tmp_path / "classes.txt"
    index.write_text("\n".join(["zebra", *sorted(images, reverse=True)]) + "\n")
    source = open_source(sources["tar"][0])
    scan(source, tmp_path / "m.jsonl", workers=0, index=index_source(source, read_classes(index), None))
    book = load_manifest(tmp_path / "m.jsonl")
    assert book.classes == ("zebra", *sorted(images, reverse=True)) and min(book.labels) == 1
    assert {book.classes[label] for label in book.labels} == set(images)
    index.write_text("n01\nn02\n")
    with pytest.raises(UserError, match=r"the class 'n03' \(3 such\) is not in the class index of 2 classes"):
        index_source(source, read_classes(index), None)
    with pytest.raises(UserError, match="holds the label 4 and the class index has 2 classes"):
        index_source(open_source(sources["webdataset"][0]), read_classes(index), None)
    index.write_text("a\na\n")
    with pytest.raises(UserError, match="names the class 'a' twice"):
        read_classes(index)


def test_a_validation_set_takes_the_class_index_of_its_training_set(images, sources, tmp_path):
    scan(sources["folder"][0], tmp_path / "train.jsonl", workers=0)
    some = {"n04": dict(list(images["n04"].items())[:2]), "n02": {"new.png": encoded(pixels(999), "PNG")}}
    report = scan(
        make.as_folder(tmp_path / "val", some), tmp_path / "val.jsonl", workers=0, against=tmp_path / "train.jsonl"
    )
    assert report.num_classes == 5 and report.empty_classes == ("n01", "n03", "n05")
    assert load_manifest(tmp_path / "val.jsonl").labels.tolist() == [1, 3, 3]
    assert len(report.duplicates.elsewhere) == 2 and "2 are in the other manifest too" in str(report)


def test_entries_and_names_are_lists():
    names, entries = Names(), Entries()
    texts = ["a/b.jpg", "", "ä/ö.jpg", os.fsdecode(b"a/\xff.jpg"), "last"]
    for k, text in enumerate(texts):
        names.append(text)
        entries.append(Entry(text, k, k << 33, -k))
    assert list(names) == texts and names[-1] == "last" and names[1:3] == texts[1:3]
    assert list(entries) == [Entry(text, k, k << 33, -k) for k, text in enumerate(texts)]
    with pytest.raises(IndexError):
        names[5]
    other = Entries()
    for entry in entries:
        other.append(entry)
    assert other.digest() == entries.digest()
    other.append(Entry("x", 0))
    assert other.digest() != entries.digest()


def test_chunks_cover_all_and_keep_together_what_is_read_together():
    rng = random.Random(0)
    for _ in range(300):
        units = [rng.randrange(1, 200) for _ in range(rng.randrange(0, 9))]
        positions = [unit << 32 | row for unit, size in enumerate(units) for row in range(size)]
        first, workers = rng.randrange(len(positions) + 1), rng.randrange(5)
        sizes = [rng.randrange(2**21) for _ in positions]
        runs = chunks(positions, first, workers, sizes if rng.random() < 0.5 else None)
        assert [number for run in runs for number in run] == list(range(first, len(positions)))
        assert all(0 < len(run) <= MAX_CHUNK for run in runs)
        assert all(len({positions[number] >> 32 for number in run}) == 1 for run in runs)
    assert [len(run) for run in chunks([0] * 5000, 0, 2)] == [128] * 39 + [8]
    assert [len(run) for run in chunks([0] * 5000, 0, 2, [2**22] * 5000)] == [2] * 2500
    assert len(chunks([0] * 4, 0, 2, [2**30] * 4)) == 4
