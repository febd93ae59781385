"""Folders as TFDS prepares them, written without TensorFlow."""

import json
import struct

import pytest


def feature(name, **content):
    """An entry of features.json: a class of tensorflow_datasets.core.features and what describes it."""
    return {"pythonClassName": f"tensorflow_datasets.core.features.{name}"} | content


def image_feature(*shape):
    return feature("image_feature.Image", image={"shape": {"dimensions": [str(n) for n in shape]}, "dtype": "uint8"})


def label_feature(class_names):
    return feature("class_label_feature.ClassLabel", classLabel={"numClasses": str(len(class_names))})


def write_tfds(root, name, version, features, class_names, examples, file_format="tfrecord"):
    """Writes a prepared data set and returns its folder.

    Args:
      root: the folder, which must not exist yet.
      name, version: of the data set.
      features: what features.json says, by name.
      class_names: of the feature "label".
      examples: split -> dicts {feature: value}; bytes, an int, or a list of floats.
      file_format: tfrecord or array_record.
    """
    pytest.importorskip("tensorflow_datasets", reason="needs the extra tfds")
    from tensorflow_datasets.proto import tf_example_pb2

    root.mkdir(parents=True)
    for split, rows in examples.items():
        records = []
        for row in rows:
            example = tf_example_pb2.Example()
            for key, value in row.items():
                stored = example.features.feature[key]
                if isinstance(value, bytes):
                    stored.bytes_list.value.append(value)
                elif isinstance(value, int):
                    stored.int64_list.value.append(value)
                else:
                    stored.float_list.value.extend(value)
            records.append(example.SerializeToString())
        path = root / f"{name}-{split}.{file_format}-00000-of-00001"
        if file_format == "tfrecord":
            path.write_bytes(b"".join(struct.pack("<Q4x", len(record)) + record + bytes(4) for record in records))
        else:
            from array_record.python import array_record_module

            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for record in records:
                writer.write(record)
            writer.close()
    splits = [
        {
            "name": split,
            "shardLengths": [str(len(rows))],
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
        for split, rows in examples.items()
    ]
    info = {"name": name, "version": version, "fileFormat": file_format, "splits": splits}
    (root / "dataset_info.json").write_text(json.dumps(info))
    content = feature("features_dict.FeaturesDict", featuresDict={"features": features})
    (root / "features.json").write_text(json.dumps(content))
    (root / "label.labels.txt").write_text("\n".join(class_names) + "\n")
    return root
