"""The same images as every kind of source, made as their publishers make them."""

import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np

Images = dict[str, dict[str, bytes]]  # class -> file name -> bytes


def add(tar: tarfile.TarFile, name: str, data: bytes, **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


def as_folder(root: Path, images: Images) -> Path:
    for name, files in images.items():
        (root / name).mkdir(parents=True)
        for file, data in files.items():
            (root / name / file).write_bytes(data)
    return root


def as_tar(path: Path, images: Images) -> Path:
    """A tar of class folders, its members in no good order."""
    with tarfile.open(path, "w") as tar:
        for name, files in reversed(images.items()):
            folder = tarfile.TarInfo(f"./{name}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for file, data in reversed(files.items()):
                add(tar, f"./{name}/{file}", data)
    return path


def as_tar_of_tars(path: Path, images: Images) -> Path:
    """As ILSVRC2012_img_train.tar."""
    with tarfile.open(path, "w") as tar:
        for name, files in images.items():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as class_tar:
                for file, data in files.items():
                    add(class_tar, file, data)
            add(tar, f"{name}.tar", inner.getvalue())
    return path


def as_validation(folder: Path, images: Images) -> tuple[Path, Path]:
    """As ILSVRC2012_img_val.tar, files renamed in the order of ``val_names``, and the development kit."""
    from scipy.io import savemat

    flat = val_names(images)
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for name, (label, file) in flat.items():
            add(tar, name, images[label][file])
    # The kit's own numbers are not those of the sorted names, and it knows inner nodes of the hierarchy too.
    numbers = {label: 1 + k for k, label in enumerate(sorted(images, reverse=True))}
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    rows = [(number, label, 0) for label, number in numbers.items()] + [(99, "n99999999", 3)]
    mat = io.BytesIO()
    savemat(mat, {"synsets": np.array(rows, kind).reshape(-1, 1)})
    with tarfile.open(folder / "devkit.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/readme.txt", b"read me")
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", mat.getvalue())
        truth = "".join(f"{numbers[label]}\n" for label, _ in flat.values())
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
    return folder / "ILSVRC2012_img_val.tar", folder / "devkit.tar.gz"


def val_names(images: Images) -> dict[str, tuple[str, str]]:
    """Name in the validation tar -> (class, file), classes in turn."""
    longest = max(map(len, images.values()))
    turns = [(label, list(files)[k]) for k in range(longest) for label, files in images.items() if k < len(files)]
    return {f"ILSVRC2012_val_{number:08d}.JPEG": item for number, item in enumerate(turns, 1)}


def mixed(images: Images) -> list[tuple[int, str, bytes]]:
    """(label, file, bytes) in the order of a shuffled data set."""
    rows = [(k, file, data) for k, name in enumerate(sorted(images)) for file, data in images[name].items()]
    return [rows[k] for k in np.random.default_rng(0).permutation(len(rows))]


def as_parquet(root: Path, images: Images, shards: int = 2, row_group_size: int = 3, names: bool = True) -> Path:
    """As Hugging Face's export: struct<bytes, path> and a label, class names in the metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(exist_ok=True)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": sorted(images)}}
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])
    if names:
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    rows = mixed(images)
    for k in range(shards):
        part = [
            {"image": {"bytes": data, "path": file}, "label": label}
            for label, file, data in rows[k * len(rows) // shards : (k + 1) * len(rows) // shards]
        ]
        path = root / f"train-{k:05d}-of-{shards:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(part, schema), path, row_group_size=row_group_size)
    return root


def as_webdataset(root: Path, images: Images, shards: int = 2) -> Path:
    root.mkdir(exist_ok=True)
    rows = mixed(images)
    for k in range(shards):
        with tarfile.open(root / f"imagenet-train-{k:04d}.tar", "w") as tar:
            for number in range(k * len(rows) // shards, (k + 1) * len(rows) // shards):
                label, file, data = rows[number]
                add(tar, f"{number:06d}.cls", f"{label}".encode())
                add(tar, f"{number:06d}.{file.rpartition('.')[2].lower()}", data)
                add(tar, f"{number:06d}.json", b"{}")
    return root


def py2_pickle(value: object) -> bytes:
    """A pickle as Python 2 wrote CIFAR's: texts as byte strings, arrays through numpy's reconstruction."""

    def dump(value: object) -> bytes:
        match value:
            case None:
                return b"N"
            case bytes():
                return b"T" + struct.pack("<i", len(value)) + value
            case int():
                return b"J" + struct.pack("<i", value)
            case list():
                return b"](" + b"".join(map(dump, value)) + b"e"
            case tuple():
                return b"(" + b"".join(map(dump, value)) + b"t"
            case dict():
                return b"}(" + b"".join(dump(item) for pair in value.items() for item in pair) + b"u"
            case np.ndarray():
                dtype = b"cnumpy\ndtype\n" + dump((value.dtype.str[1:].encode(), 0, 1)) + b"R"
                dtype += dump((3, b"|", None, None, None, -1, -1, 0)) + b"b"
                made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + dump((0,)) + dump(b"b") + b"tR"
                state = b"(" + dump(1) + dump(value.shape) + dtype + dump(0) + dump(value.tobytes()) + b"t"
                return made + state + b"b"
        raise TypeError(value)

    return b"\x80\x02" + dump(value) + b"."


def as_cifar(path: Path, pixels: np.ndarray, labels: list[int], names: list[str], batches: int = 2) -> Path:
    """As cifar-10-python.tar.gz; ``pixels`` uint8 [n, 32, 32, 3]; the last batch is the test set."""
    rows = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(len(pixels), -1)
    with tarfile.open(path, "w:gz") as tar:
        bounds = np.linspace(0, len(rows), batches + 1).astype(int)
        for k in range(batches):
            part = slice(int(bounds[k]), int(bounds[k + 1]))
            name = "test_batch" if k == batches - 1 else f"data_batch_{k + 1}"
            content = {b"batch_label": name.encode(), b"labels": labels[part], b"data": rows[part], b"filenames": []}
            add(tar, f"cifar-10-batches-py/{name}", py2_pickle(content))
        meta = {b"num_cases_per_batch": 10000, b"label_names": [name.encode() for name in names]}
        add(tar, "cifar-10-batches-py/batches.meta", py2_pickle(meta))
    return path
