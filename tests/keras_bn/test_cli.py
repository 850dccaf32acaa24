"""The `keras-bn` command, on files as a user has them."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest

import keras_bn
import keras_bn_command

RNG = np.random.default_rng(0)
CLASSES = np.arange(64) % 2
IMAGES = RNG.normal(50.0, 20.0, (64, 6, 6, 3)).astype("float32")
IMAGES[CLASSES == 1] += 60.0


def _model(moves=True):
    """Trained, with statistics of the data, or those of a new layer."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 3), name="pixels"),
            keras_bn.BatchNormalization(momentum=0.0),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.05), loss)
    model.fit(IMAGES, CLASSES, batch_size=64, epochs=10, verbose=0)
    if not moves:
        keras_bn.reset_statistics(model)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    _model().save(folder / "healthy.keras")
    _model(moves=False).save(folder / "stale.keras")
    keras.Sequential([keras.Input((6, 6, 3)), keras.layers.Flatten()]).save(
        folder / "plain.keras"
    )
    np.savez(folder / "data.npz", x=IMAGES, y=CLASSES)
    np.savez(folder / "unlabelled.npz", x=IMAGES)
    np.savez(folder / "others.npz", a=IMAGES)
    np.savez(folder / "empty.npz", x=IMAGES[:0], y=CLASSES[:0])
    broken = np.where(IMAGES == IMAGES[9, 0, 0, 0], np.nan, IMAGES)
    np.savez(folder / "nan.npz", x=broken, y=CLASSES)
    np.savez(folder / "wide.npz", x=np.zeros((4, 6, 6, 5)), y=CLASSES[:4])
    np.save(folder / "labels.npy", CLASSES)
    np.save(folder / "few.npy", CLASSES[:-1])
    whole = (folder / "healthy.keras").read_bytes()
    (folder / "cut.keras").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(folder / "other.keras", "w") as file:
        file.writestr("config.json", "{}")
    (folder / "model.h5").write_bytes(b"")
    (folder / "none").mkdir()
    for number in range(2):
        (folder / "images" / str(number)).mkdir(parents=True)
        for i in np.flatnonzero(CLASSES == number)[:8]:
            image = np.clip(IMAGES[i], 0, 255).astype("uint8")
            path = folder / "images" / str(number) / f"{i}.png"
            keras.utils.save_img(path, image, scale=False)
    return folder


def _run(files, capsys, *arguments):
    """The exit code, and what was printed."""
    here = os.getcwd()
    os.chdir(files)
    try:
        code = keras_bn_command.main(list(arguments))
    finally:
        os.chdir(here)
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    "arguments, status",
    [
        (["healthy.keras"], "healthy"),
        (["healthy.keras", "--data", "data.npz"], "healthy"),
        (["healthy.keras", "--data", "images"], "healthy"),
        (["stale.keras"], "findings"),
        (["stale.keras", "--data", "data.npz"], "findings"),
        (
            ["stale.keras", "--data", "unlabelled.npz", "--labels=labels.npy"],
            "findings",
        ),
        (["stale.keras", "--data", "images", "--batch_size=16"], "findings"),
    ],
)
def test_audit(arguments, status, files, capsys):
    code, table, _ = _run(files, capsys, "audit", *arguments)
    assert code == (0 if status == "healthy" else 1)
    assert table.startswith(f"Batch normalization: {status}.")
    code, document, _ = _run(files, capsys, "audit", *arguments, "--json")
    assert json.loads(document)["status"] == status
    if status == "findings" and "--data" in arguments:
        assert "keras_bn.recalibrate(model, data)" in table


def _two_inputs(folder, structure, outputs):
    """A model of inputs a and b, and its arrays; labels by name, and not."""
    a, b = keras.Input((2,), name="b"), keras.Input((3,), name="a")
    inputs = {
        "list": lambda: [a, b],
        "dictionary": lambda: {"b": a, "a": b},
        "nested": lambda: {"all": [a, (b,)]},
        "one": lambda: a,
    }[structure]()
    y = keras.layers.BatchNormalization()(a)
    if structure != "one":
        y = keras.layers.Concatenate()([y, b])
    names = ["first", "second"][:outputs]
    y = [keras.layers.Dense(2, name=name)(y) for name in names]
    model = keras.Model(inputs, y if outputs > 1 else y[0])
    model.compile("sgd", "mse")
    model.layers[-1].kernel.assign(model.layers[-1].kernel * 2.0)
    model.save(folder / "two.keras")
    rng = np.random.default_rng(0)
    arrays = {"b": rng.normal(3.0, 2.0, (40, 2)), "a": rng.normal(size=(40, 3))}
    if structure == "one":
        del arrays["a"]
    values = [arrays[x.name] for x in keras.tree.flatten(inputs)]
    labels = model.predict(
        keras.tree.pack_sequence_as(inputs, values), verbose=0
    )
    np.savez(folder / "inputs.npz", **arrays)
    if outputs == 1:
        np.savez(folder / "labelled.npz", **arrays, y=labels)
        np.save(folder / "labels.npy", labels)
        labels = [labels]
    np.savez(folder / "named.npz", **arrays, **dict(zip(names, labels)))
    np.savez(folder / "b.npz", b=arrays["b"])
    return arrays["b"]


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("structure", ["list", "dictionary", "nested", "one"])
def test_arrays_by_the_names_of_inputs(structure, outputs, tmp_path, capsys):
    values = _two_inputs(tmp_path, structure, outputs)
    data = ["named.npz"] if outputs == 2 else ["named.npz", "labelled.npz"]
    for name in data:
        # In inference the outputs are right, which only labels can tell.
        arguments = ["audit", "two.keras", f"--data={name}", "--json"]
        code, printed, _ = _run(tmp_path, capsys, *arguments)
        assert code in (0, 1)
        scores = json.loads(printed)["scores"]
        assert scores["name"] == "loss" and scores["in_inference"] < 1e-9
        arguments = ["recalibrate", "two.keras", f"--data={name}"]
        code, _, error = _run(tmp_path, capsys, *arguments, "--output=x.keras")
        assert code == 2 and "Received: force=False" in error
    arguments = ["recalibrate", "two.keras", "--data=inputs.npz"]
    assert _run(tmp_path, capsys, *arguments, "--output=x.keras")[0] == 0
    (layer,) = [
        x
        for x in keras.saving.load_model(tmp_path / "x.keras").layers
        if isinstance(x, keras.layers.BatchNormalization)
    ]
    mean = keras.ops.convert_to_numpy(layer.moving_mean)
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-5)
    if outputs == 1:
        arguments = ["audit", "two.keras", "--data=inputs.npz"]
        arguments += ["--labels=labels.npy", "--json"]
        _, printed, _ = _run(tmp_path, capsys, *arguments)
        assert json.loads(printed)["scores"]["in_inference"] < 1e-9
    if structure != "one":
        code, _, error = _run(
            tmp_path, capsys, "audit", "two.keras", "--data=b.npz"
        )
        names = "['a', 'b']" if structure == "dictionary" else "['b', 'a']"
        assert code == 2 and f"arrays ['b'], inputs {names}" in error


def test_labels_of_one_of_two_outputs(tmp_path, capsys):
    _two_inputs(tmp_path, "list", 2)
    with np.load(tmp_path / "named.npz") as file:
        arrays = dict(file)
    del arrays["second"]
    np.savez(tmp_path / "part.npz", **arrays)
    arguments = ["audit", "two.keras", "--data=part.npz"]
    code, _, error = _run(tmp_path, capsys, *arguments)
    assert code == 2
    assert "labels ['first'], outputs ['first', 'second']" in error


def test_recalibrate(files, capsys, tmp_path):
    output = tmp_path / "mended.keras"
    code, printed, _ = _run(
        files,
        capsys,
        *("recalibrate", "stale.keras", "--data", "data.npz"),
        *("--output", str(output), "--json"),
    )
    assert code == 0
    assert json.loads(printed)[0]["positions"] == 64 * 36
    model = keras.saving.load_model(output)
    mean = IMAGES.astype("float64").mean((0, 1, 2))
    np.testing.assert_allclose(model.layers[0].moving_mean.numpy(), mean, 1e-5)
    assert _run(files, capsys, "audit", str(output))[0] == 0
    assert os.listdir(tmp_path) == ["mended.keras"]


def test_recalibrate_refuses_what_labels_refute(files, capsys, tmp_path):
    """A model that is right with its statistics, and wrong with others."""
    layers = [keras.Input((2,)), keras_bn.BatchNormalization()]
    model = keras.Sequential(layers)
    model.save(tmp_path / "inference.keras")
    values = (RNG.normal(size=(64, 2)) + [9.0, 0.0]).astype("float32")
    np.savez(tmp_path / "data.npz", x=values, y=np.zeros(64, int))
    arguments = ["recalibrate", "inference.keras", "--data", "data.npz"]
    arguments += ["--output", "out.keras"]
    code, _, error = _run(tmp_path, capsys, *arguments)
    assert code == 2 and "force=True" in error
    assert not (tmp_path / "out.keras").exists()
    assert _run(tmp_path, capsys, *arguments, "--force")[0] == 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["missing.keras"], "no such file"),
        (["model.h5"], "must be a .keras file"),
        (["cut.keras"], "damaged"),
        (["other.keras"], "cannot load other.keras"),
        (["plain.keras"], "found no batch normalization"),
        (["healthy.keras", "--labels", "labels.npy"], "Give --data as well"),
        (["healthy.keras", "--data", "missing.npz"], "no such file"),
        (
            ["healthy.keras", "--data", "others.npz"],
            "Received: arrays ['a'], inputs ['pixels']",
        ),
        (["healthy.keras", "--data", "empty.npz"], "`data` is empty"),
        (["healthy.keras", "--data", "nan.npz"], "not finite"),
        (["healthy.keras", "--data", "wide.npz"], "expected axis"),
        (["healthy.keras", "--data", "none"], "holds no images"),
        (["healthy.keras", "--data", "./missing"], "no such folder"),
        (["healthy.keras", "--data", "no_such_dataset"], "--data=no_such_data"),
        (
            ["healthy.keras", "--data", "wine_quality"],
            # This one's builder imports it.
            "not prepared in"
            if importlib.util.find_spec("tensorflow")
            else "needs tensorflow to be read",
        ),
        (
            ["healthy.keras", "--data", "unlabelled.npz", "--labels=few.npy"],
            "63 labels for 64 samples",
        ),
        (
            ["healthy.keras", "--data", "data.npz", "--labels", "none"],
            "not a file. Received: --labels=none",
        ),
        (["healthy.keras", "--data", "images", "--labels=x"], "Leave it out"),
        (["healthy.keras", "--data", "data.npz", "--steps=9"], "ended early"),
        (["healthy.keras", "--data", "data.npz", "--steps=0"], "--steps=0"),
        (["healthy.keras", "--batch_size=0"], "--batch_size=0"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input(arguments, said, files, capsys):
    before = {x: x.read_bytes() for x in files.glob("*.keras")}
    code, printed, error = _run(files, capsys, "audit", *arguments)
    assert code == 2 and not printed
    assert before == {x: x.read_bytes() for x in files.glob("*.keras")}
    assert error.startswith("keras-bn: error: ") and said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("output", ["out.h5", "missing/out.keras"])
def test_outputs_that_cannot_be(output, files, capsys):
    arguments = ["recalibrate", "stale.keras", "--data", "data.npz"]
    code, _, error = _run(files, capsys, *arguments, "--output", output)
    assert code == 2 and f"--output={output}" in error


def test_custom_objects_that_are_missing(tmp_path, capsys):
    program = f"""
import keras

class Mine(keras.layers.Layer):
    def call(self, inputs):
        return inputs

def function(x):
    return x

for name, layer in {{
    "mine": Mine(),
    "function": keras.layers.Activation(function),
    "lambda": keras.layers.Lambda(lambda x: x),
}}.items():
    layers = [keras.Input((3,)), layer, keras.layers.BatchNormalization()]
    keras.Sequential(layers).save({str(tmp_path)!r} + "/" + name + ".keras")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    for said in (
        "mine.keras with Mine",
        "function.keras with function",
        "lambda.keras with a Lambda layer",
    ):
        code, _, error = _run(tmp_path, capsys, "audit", said.split()[0])
        assert code == 2
        assert said in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, code",
    [(["--help"], 0), (["audit"], 2), (["audit", "missing.keras"], 2)],
)
def test_help_and_usage_need_no_framework(arguments, code):
    program = """
import sys
import keras_bn_command

try:
    code = keras_bn_command.main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print(sorted({"keras", "tensorflow", "jax", "torch"} & set(sys.modules)))
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert done.stdout.endswith("[]\n")


def test_a_prepared_dataset(tmp_path):
    """CIFAR-10 as it lies there: without TensorFlow from ArrayRecord files."""
    folder = os.environ.get("TFDS_DATA_DIR", "")
    if keras.backend.backend() != "tensorflow":
        folder += "_array_record"
    if not os.path.isdir(os.path.join(folder, "cifar10")):
        pytest.skip("TFDS_DATA_DIR names no folder with CIFAR-10")
    layers = [keras.Input((32, 32, 3)), keras.layers.BatchNormalization()]
    keras.Sequential(layers).save(tmp_path / "model.keras")
    program = "import keras_bn_command, sys; sys.exit(keras_bn_command.main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "recalibrate", "model.keras"]
        + ["--data=cifar10:test[:1000]", "--output=out.keras", "--force"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ
        | {"TFDS_DATA_DIR": folder, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    if keras.backend.backend() == "tensorflow":
        # Its own lines would come before what is to be read.
        assert "oneDNN" not in done.stderr and "cuda" not in done.stderr
    layer = keras.saving.load_model(tmp_path / "out.keras").layers[0]
    found = keras.ops.convert_to_numpy(layer.moving_mean)
    # The means of CIFAR-10 by channel, known to be 125.3, 123.0, 113.9.
    np.testing.assert_allclose(found, [125.3, 123.0, 113.9], atol=5.0)


def test_usage(capsys):
    for arguments in ([], ["mend"], ["recalibrate", "a.keras"]):
        with pytest.raises(SystemExit) as end:
            keras_bn_command.main(arguments)
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("keras-bn: error: ") and "--help`" in error
        assert error.count("\n") == 1
