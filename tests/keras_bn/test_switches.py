"""Which statistics normalize, whether they update, what trains: apart."""

import copy
import itertools
import warnings

import keras
import numpy as np
import pytest

import keras_bn
from tests.keras_bn import frameworks

OURS = keras_bn.BatchNormalization
KERAS = keras.layers.BatchNormalization

DEFAULTS = {
    "use_moving_statistics": None,
    "update_moving_statistics": True,
    "train_gamma_and_beta": True,
}
OPTIONS = [
    {},
    {"renorm": True, "renorm_momentum": 0.5},
    {"renorm": True, "renorm_clipping": keras_bn.renorm_schedule(begin=0)},
    {"virtual_batch_size": 3},
    {"momentum": None},
    {"debias": True},
    {"unbiased_variance": True, "virtual_batch_size": 5},
    {"axis": (1, 2)},
    {"center": False},
]
SHAPE = (8, 2, 3)


def _values(seed, shape=SHAPE):
    generator = np.random.default_rng(seed)
    return generator.normal(1.0, 2.0, shape).astype("float32")


def _layer(**kwargs):
    """A layer that has seen one batch, with gamma and beta of its own."""
    layer = OURS(**{"momentum": 0.75, **kwargs})
    layer.build(SHAPE)
    for seed, weight in enumerate((layer.gamma, layer.beta)):
        if weight is not None:
            weight.assign(1.0 + _values(seed, weight.shape) / 4.0)
    layer(frameworks.tensor(_values(9)), training=True)
    return layer


def _call(layer, training, mask):
    """Outputs, and the statistics afterwards, of a copy of `layer`."""
    twin = type(layer).from_config(layer.get_config())
    twin.build(SHAPE)
    twin.set_weights(layer.get_weights())
    mask = frameworks.tensor(_MASK, "bool") if mask else None
    outputs = twin(frameworks.tensor(_values(0)), training=training, mask=mask)
    return frameworks.array(outputs), _statistics(twin)


def _statistics(layer):
    return [w.numpy() for w in layer.weights if w.name not in _AFFINE]


_AFFINE = ("gamma", "beta")
_MASK = np.arange(8).reshape(8, 1, 1) % 3 > 0


def test_with_every_option():
    """Each choice is that of the layer which makes it by default."""
    # In one test, in which JAX compiles each operation once.
    for i, options in enumerate(OPTIONS):
        check_switches_with(options, masked=i % 2 == 0)


def check_switches_with(options, masked):
    layer = _layer(**options)
    statistics = _statistics(layer)
    in_training, updated = _call(layer, True, masked)
    with_moving, _ = _call(layer, False, masked)
    plain = layer.get_config() | {"renorm": False, "virtual_batch_size": None}
    plain = OURS.from_config(plain)
    plain.build(SHAPE)
    plain.set_weights(layer.get_weights()[: len(plain.weights)])
    with_batch, _ = _call(plain, True, masked)

    for use, update, training in [
        (None, False, True),
        (True, True, True),
        (True, False, True),
        (False, True, False),
    ]:
        layer.use_moving_statistics = use
        layer.update_moving_statistics = update
        outputs, after = _call(layer, training, masked)
        if use is True or (use is None and not training):
            right = with_moving
        else:
            right = in_training if training else with_batch
        what = f"{options} {use} {update} {training}"
        np.testing.assert_allclose(outputs, right, 2e-5, 2e-5, err_msg=what)
        expected = updated if training and update else statistics
        for now, then in zip(after, expected, strict=True):
            np.testing.assert_allclose(now, then, 1e-5, 1e-6, err_msg=what)


def test_by_the_formula():
    """In float64, from NumPy."""
    both = (True, False)
    for setting in itertools.product((None, True, False), both, both, both):
        check_formula(*setting)


def check_formula(use, update, training, trainable):
    layer = OURS(
        momentum=0.5,
        use_moving_statistics=use,
        update_moving_statistics=update,
        trainable=trainable,
    )
    layer.build((8, 3))
    mean, variance = np.array([1.0, -2, 3]), np.array([4.0, 0.25, 9])
    gamma, beta = np.array([2.0, 0.5, -1]), np.array([0.0, 1, 2])
    layer.set_weights([gamma, beta, mean, variance])
    inputs = _values(5, (8, 3))
    outputs = layer(frameworks.tensor(inputs), training=training)

    wide = inputs.astype("float64")
    batch = wide.mean(0), wide.var(0)
    trains = training and trainable
    with_batch = trains if use is None else not use
    center, spread = batch if with_batch else (mean, variance)
    right = (wide - center) / np.sqrt(spread + 1e-3) * gamma + beta
    np.testing.assert_allclose(frameworks.array(outputs), right, 1e-5, 1e-5)
    if trains and update:
        mean = (mean + batch[0]) / 2
        variance = (variance + batch[1]) / 2
    found = layer.get_weights()[2:]
    np.testing.assert_allclose(found, [mean, variance], 1e-5)


def test_training_on_moving_statistics_has_keras_gradients_of_inference():
    theirs, ours = KERAS(), OURS(use_moving_statistics=True)
    for layer in (theirs, ours):
        layer.build((8, 3))
        layer.set_weights([_values(i, (3,)) ** 2 for i in range(4)])
    inputs = frameworks.tensor(_values(0, (8, 3)))
    right = frameworks.training_step(theirs, inputs, training=False)
    found = frameworks.training_step(ours, inputs)
    for a, b in [
        (found.outputs, right.outputs),
        (found.input_gradient, right.input_gradient),
        (found.weight_gradients["gamma"], right.weight_gradients["gamma"]),
        (found.weight_gradients["beta"], right.weight_gradients["beta"]),
    ]:
        np.testing.assert_allclose(a, b, 1e-5, 1e-5)
    assert not np.allclose(
        found.statistics["moving_mean"], right.statistics["moving_mean"]
    )


def test_gamma_and_beta_stay_in_their_place():
    theirs, ours = KERAS(), OURS(train_gamma_and_beta=False)
    for layer in (theirs, ours):
        layer.build((8, 3))
    names = [w.name for w in theirs.weights]
    assert [w.name for w in ours.weights] == names
    assert ours.trainable_weights == []
    ours.set_weights([_values(i, (3,)) for i in range(4)])
    theirs.set_weights(ours.get_weights())
    np.testing.assert_array_equal(theirs.gamma.numpy(), ours.gamma.numpy())
    # Neither `trainable` nor setting it again wins over the switch.
    for trainable in (True, False, True):
        ours.trainable = trainable
        assert ours.trainable_weights == []
    ours.train_gamma_and_beta = True
    assert [w.name for w in ours.trainable_weights] == ["gamma", "beta"]
    ours.trainable = False
    ours.train_gamma_and_beta = False
    ours.train_gamma_and_beta = True
    assert ours.trainable_weights == []
    assert not ours.gamma.trainable
    assert [w.name for w in ours.weights] == names


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_moving_statistics": True},
        {"use_moving_statistics": False},
        {"update_moving_statistics": False, "train_gamma_and_beta": False},
    ],
    ids=str,
)
def test_config_holds_what_differs_from_the_default(kwargs):
    config = OURS(**kwargs).get_config()
    assert {k: v for k, v in config.items() if k in DEFAULTS} == kwargs
    again = OURS.from_config(config)
    for name, default in DEFAULTS.items():
        assert getattr(again, name) is kwargs.get(name, default)
    again = OURS()
    for name, value in kwargs.items():
        setattr(again, name, value)
    assert again.get_config() | {"name": config["name"]} == config
    if not kwargs:
        KERAS.from_config(config)


@pytest.mark.parametrize("name", DEFAULTS)
def test_other_values(name):
    values = [1, 0, "yes", 0.0, [True], np.True_]
    if name != "use_moving_statistics":
        values.append(None)
    layer = OURS()
    for value in values:
        for refused in (
            lambda: OURS(**{name: value}),
            lambda: setattr(layer, name, value),
        ):
            with pytest.raises(ValueError) as error:
                refused()
            assert f"Received: {name}={value!r}" in str(error.value)
            assert "\n" not in str(error.value)
    assert getattr(layer, name) is DEFAULTS[name]


# What is set after a function was compiled.

FLIPS = {
    "use_moving_statistics": True,
    "update_moving_statistics": False,
    "train_gamma_and_beta": False,
    "trainable": False,
}
COMPILES = not frameworks.IS_TORCH


def _model(**kwargs):
    layers = [keras.Input((3,)), keras.layers.Dense(3), OURS(**kwargs)]
    return _compile(keras.Sequential(layers))


def _compile(model):
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def _fit(model):
    """The names of the weights that a step of `fit` changes."""
    inputs = _values(3, (16, 3))
    before = model.get_weights()
    model.fit(inputs, inputs, batch_size=16, verbose=0)
    return {
        w.name
        for w, then in zip(model.weights, before)
        if not np.array_equal(w.numpy(), then)
    } - {"kernel", "bias"}


ALL = {"gamma", "beta", "moving_mean", "moving_variance"}
CHANGED = {
    "use_moving_statistics": ALL,
    "update_moving_statistics": {"gamma", "beta"},
    "train_gamma_and_beta": {"moving_mean", "moving_variance"},
    "trainable": set(),
}


def _warned(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [w for w in caught if issubclass(w.category, UserWarning)]


def _flip(layer, name, value):
    return _warned(lambda: setattr(layer, name, value))


def _train(model):
    """A step of `fit`; with a flip of what trains it fails on JAX."""
    inputs = _values(3, (16, 3))
    try:
        model.fit(inputs, inputs, batch_size=16, verbose=0)
    except ValueError:
        assert frameworks.IS_JAX


def _compiled_before(model, name, value, kind="Training"):
    """What is said where a function of `model` is run too late."""
    layer = model.layers[-1].name
    return (
        f"{kind} of model {model.name!r} goes on as it was compiled, "
        f"before {name}={value} was set on its BatchNormalization {layer!r}; "
        "call `compile` of that model again."
    )


def _other_weights(model):
    """What is said on JAX, where the step then fails."""
    return (
        f"The optimizer of model {model.name!r} holds 4 weights and the model "
        f"trains {len(model.trainable_variables)}, since `trainable` or "
        "`train_gamma_and_beta` was set after they met; set it back before "
        "this model trains, or call `compile` of that model again."
    )


@pytest.mark.parametrize("name", FLIPS)
def test_a_flip_before_and_after_compile(name):
    model = _model()
    layer = model.layers[-1]
    usual = getattr(layer, name)
    # Before anything was traced, there and back.
    assert not _flip(layer, name, FLIPS[name])
    assert not _flip(layer, name, usual)
    assert _fit(model) == ALL
    # There and back: what was compiled is run as the layer is set.
    assert not _flip(layer, name, FLIPS[name])
    assert not _flip(layer, name, usual)
    assert not _warned(lambda: _train(model))

    # Compiled again before it is run.
    assert not _flip(layer, name, FLIPS[name])
    _compile(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert _fit(model) == CHANGED[name]
        assert not _flip(layer, name, usual)
        _compile(model)
        assert _fit(model) == ALL

    # Not compiled again.
    if frameworks.IS_TORCH:
        return
    assert not _flip(layer, name, FLIPS[name])
    caught = _warned(lambda: _train(model))
    fails = frameworks.IS_JAX and not name.endswith("moving_statistics")
    said = (
        _other_weights(model)
        if fails
        else _compiled_before(model, name, FLIPS[name])
    )
    assert [str(w.message) for w in caught] == [said]
    assert caught[0].filename == __file__
    if not fails:
        # Said once for what was set.
        assert not _warned(lambda: _train(model))
        assert not _flip(layer, name, usual)
        assert not _warned(lambda: _train(model))
        _flip(layer, name, FLIPS[name])
        assert len(_warned(lambda: _train(model))) == 1


@pytest.mark.parametrize("name", FLIPS)
def test_a_flip_that_pytorch_follows_at_once_and_jax_does_not(name):
    model = _model()
    _fit(model)
    _flip(model.layers[-1], name, FLIPS[name])
    if frameworks.IS_TORCH:
        assert _fit(model) == CHANGED[name]
    elif frameworks.IS_TENSORFLOW or name.endswith("moving_statistics"):
        assert _fit(model) == ALL
    else:
        with pytest.raises(ValueError, match=r"len\(trainable_variables\)"):
            _fit(model)


@pytest.mark.parametrize("name", ["trainable", "train_gamma_and_beta"])
def test_a_flip_of_a_model_that_was_loaded(name, tmp_path):
    """Its optimizer is there before any trace; on JAX it does not follow."""
    model = _model()
    _fit(model)
    model.save(tmp_path / "model.keras")

    def flipped():
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        setattr(loaded.layers[-1], name, False)
        return loaded

    if frameworks.IS_JAX:
        with pytest.warns(UserWarning, match="call `compile` of that model"):
            with pytest.raises(ValueError, match="1:1"):
                _fit(flipped())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = flipped()
        if frameworks.IS_JAX:
            _compile(loaded)
        assert _fit(loaded) == CHANGED[name]


@pytest.mark.parametrize("name", FLIPS)
def test_the_normalizers_that_fit_uses_after_compile(name):
    """The moving statistics that a step leaves tell which ones it used."""
    model = keras.Sequential([keras.Input((3,)), OURS(momentum=0.0)])
    layer = model.layers[-1]
    _compile(model)
    _fit(model)
    setattr(layer, name, FLIPS[name])
    layer.moving_mean.assign([7.0] * 3)
    _compile(model)
    inputs = _values(4, (16, 3))
    loss = model.train_on_batch(inputs, 0.0 * inputs)
    gamma = layer.gamma.numpy()
    far = name in ("use_moving_statistics", "trainable")
    assert (loss > 4 * (gamma**2).mean()) == far


def test_a_whole_model_made_not_trainable():
    """One warning, for as many layers as there are."""
    inner = keras.Sequential(
        [keras.Input((3,)), OURS(name="a"), OURS(name="b")]
    )
    inputs = keras.Input((3,))
    model = _compile(keras.Model(inputs, keras.layers.Dense(3)(inner(inputs))))
    _fit(model)
    model.trainable = False
    if frameworks.IS_TENSORFLOW:
        (warning,) = _warned(lambda: _fit(model))
        assert "BatchNormalization 'a' and 1 more;" in str(warning.message)
    _compile(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # Keras says that nothing trains.
        warnings.filterwarnings("ignore", message=".*any trainable weights")
        assert _fit(model) == set()


def test_evaluate_and_predict():
    """Only what would change in inference is too late for them."""
    model = _model()
    layer = model.layers[-1]
    inputs = _values(3, (16, 3))

    def evaluate():
        model.evaluate(inputs, inputs, verbose=0)

    def predict():
        model.predict(inputs, verbose=0)

    def test_on_batch():
        model.test_on_batch(inputs, inputs)

    predict()
    evaluate()
    for name, value in FLIPS.items():
        setattr(layer, name, value)
        setattr(layer, name, DEFAULTS.get(name, True))
    layer.update_moving_statistics = False
    assert not _warned(evaluate) + _warned(predict)
    for run, kind in (
        (evaluate, "Evaluation"),
        (predict, "Prediction"),
        (test_on_batch, "Evaluation"),
    ):
        layer.use_moving_statistics = None
        layer.use_moving_statistics = False
        said = [
            _compiled_before(model, "use_moving_statistics", False, kind)
        ] * COMPILES
        assert [str(w.message) for w in _warned(run)] == said


def test_a_callback_that_flips_in_the_middle_of_fit():
    model = _model()
    layer = model.layers[-1]

    def flip(batch, logs):
        layer.update_moving_statistics = batch > 0

    callback = keras.callbacks.LambdaCallback(on_train_batch_begin=flip)
    layer.update_moving_statistics = False
    inputs = _values(3, (16, 3))
    caught = _warned(
        lambda: model.fit(
            inputs, inputs, batch_size=8, verbose=0, callbacks=[callback]
        )
    )
    assert len(caught) == COMPILES


def test_a_layer_in_two_models():
    """Compiling one of them again leaves the other as it was."""
    layer = OURS()
    models = [
        _compile(keras.Sequential([keras.Input((3,)), layer])) for _ in range(2)
    ]
    for model in models:
        _fit(model)
    layer.use_moving_statistics = True
    _compile(models[1])
    assert not _warned(lambda: _train(models[1]))
    assert len(_warned(lambda: _train(models[0]))) == COMPILES
    _compile(models[0])
    assert not _warned(lambda: _train(models[0]))


# Programs that are right.


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def _network(outputs, layer=OURS):
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4),
            layer(),
            keras.layers.Dense(outputs),
        ]
    )


def _gan(as_sequential=False):
    """A discriminator that was trained, and the model that holds it frozen."""
    keras.utils.set_random_seed(0)
    generator, discriminator = _network(3), _network(1)
    _compile(discriminator)
    discriminator.train_on_batch(_values(0, (8, 3)), np.zeros((8, 1)))
    discriminator.trainable = False
    if as_sequential:
        gan = keras.Sequential([generator, discriminator])
    else:
        noise = keras.Input((3,))
        gan = keras.Model(noise, discriminator(generator(noise)))
    return discriminator, _compile(gan)


def _changes(model, run):
    """Whether `run` trains what is in `model`."""
    before = model.get_weights()
    run()
    return not all(map(np.array_equal, model.get_weights(), before))


@pytest.mark.parametrize("as_sequential", [False, True])
@pytest.mark.parametrize("toggles", [False, True])
def test_a_gan(no_warning, toggles, as_sequential):
    """Each of its models goes on as it was compiled, on TensorFlow.

    JAX and PyTorch want `trainable` set as each was compiled.
    """
    discriminator, gan = _gan(as_sequential)
    toggles = toggles or not frameworks.IS_TENSORFLOW

    def train_discriminator():
        discriminator.train_on_batch(_values(1, (8, 3)), np.ones((8, 1)))

    def train_generator():
        gan.train_on_batch(_values(2, (8, 3)), np.zeros((8, 1)))

    for _ in range(3):
        if toggles:
            discriminator.trainable = True
        assert _changes(discriminator, train_discriminator)
        if toggles:
            discriminator.trainable = False
        assert not _changes(discriminator, train_generator)
    if frameworks.IS_TENSORFLOW:
        discriminator.trainable = True
        assert not _changes(discriminator, train_generator)
        assert _changes(discriminator, train_discriminator)


@pytest.mark.parametrize("trainable", [False, True])
def test_the_audit_of_a_gan(no_warning, trainable):
    discriminator, gan = _gan()
    gan.train_on_batch(_values(2, (8, 3)), np.zeros((8, 1)))
    discriminator.trainable = trainable
    for model in (discriminator, gan):
        found = [f.what for f in keras_bn.audit(model).findings]
        assert not [what for what in found if "after compile" in what]


def test_a_gan_whose_switch_is_set_too_late():
    """`trainable` may be meant for the other model, but no switch is."""
    discriminator, gan = _gan()
    noise, targets = _values(2, (8, 3)), np.zeros((8, 1))
    gan.train_on_batch(noise, targets)
    gan.layers[1].layers[1].update_moving_statistics = False
    if frameworks.IS_TENSORFLOW:
        discriminator.trainable = True
    caught = _warned(lambda: gan.train_on_batch(noise, targets))
    assert len(caught) == COMPILES
    for warning in caught:
        assert "update_moving_statistics=False was" in str(warning.message)


def test_layers_in_a_new_model(no_warning):
    """Transfer learning, with the layers and with the model."""
    model = _network(2)
    inputs, targets = _values(0, (8, 3)), np.zeros((8, 2))
    _compile(model).fit(inputs, targets, verbose=0)
    body = keras.Model(model.inputs, model.layers[1].output)
    body.trainable = False
    heads = [
        keras.Model(model.inputs, keras.layers.Dense(2)(body.outputs[0])),
        keras.Sequential([keras.Input((3,)), body, keras.layers.Dense(2)]),
    ]
    for head in heads:
        _compile(head).fit(inputs, targets, verbose=0)
        head.evaluate(inputs, targets, verbose=0)
    body.trainable = True
    for head in heads:
        _compile(head).fit(inputs, targets, verbose=0)
    model.predict(inputs, verbose=0)


def test_freeze_and_thaw(no_warning):
    model = _model()
    assert _fit(model) == ALL
    keras_bn.freeze(model)
    assert _fit(model) == {"gamma", "beta"}
    keras_bn.thaw(model)
    assert _fit(model) == ALL


def test_what_was_audited_and_recalibrated(no_warning):
    """Functions of this library are no functions of the user's."""
    model = _model()
    _fit(model)
    inputs = _values(3, (16, 3))
    keras_bn.recalibrate(model, inputs, verbose=0)
    keras_bn.audit(model, inputs, inputs)
    for name, value in FLIPS.items():
        setattr(model.layers[-1], name, value)


class Subclassed(keras.Model):
    """Built by tracing `call` for its shapes."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3)
        self.normalization = OURS()

    def call(self, inputs, training=None):
        return self.normalization(self.dense(inputs), training=training)


def test_asking_for_shapes_compiles_nothing():
    model = Subclassed()
    inputs = keras.Input((3,))
    keras.Model(inputs, model(inputs, training=True))
    assert model.normalization.built
    for name, value in FLIPS.items():
        assert not _flip(model.normalization, name, value)


def test_running_eagerly_compiles_nothing():
    model = _model()
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    _fit(model)
    model.layers[-1](_values(0, (4, 3)), training=True)
    for name in ("update_moving_statistics", "use_moving_statistics"):
        assert not _flip(model.layers[-1], name, FLIPS[name])
    assert _fit(model) == {"gamma", "beta"}


def test_copies_were_not_traced(tmp_path):
    model = _model(update_moving_statistics=False)
    _fit(model)
    model.save(tmp_path / "model.keras")
    for other in (
        copy.deepcopy(model),
        keras.models.clone_model(model),
        keras.saving.load_model(tmp_path / "model.keras"),
    ):
        layer = other.layers[-1]
        assert layer.update_moving_statistics is False
        layer.update_moving_statistics = True
        _compile(other)
        assert not _warned(lambda: _train(other))


def test_a_function_of_ones_own():
    layer = OURS(momentum=0.0)
    layer.build((8, 3))
    inputs = frameworks.tensor(_values(0, (8, 3)))

    def compiled():
        if frameworks.IS_JAX:
            state = [v.value for v in layer.variables[2:]]
            weights = [v.value for v in layer.variables[:2]]
            run = frameworks.jitted(
                lambda x: layer.stateless_call(
                    weights, state, x, training=True
                )[1][0]
            )
            return lambda: frameworks.array(run(inputs))

        def step(x):
            layer(x, training=True)
            return keras.ops.convert_to_tensor(layer.moving_mean)

        if frameworks.IS_TENSORFLOW:
            run = frameworks.jitted(step)
        else:
            import torch

            run = torch.compile(step, backend="eager")
        return lambda: frameworks.array(run(inputs))

    run = compiled()
    mean = frameworks.array(inputs).mean(0)
    np.testing.assert_allclose(run(), mean, 1e-5)
    layer.moving_mean.assign([7.0] * 3)
    # It may be meant for a model that the layer is in.
    assert not _flip(layer, "trainable", False)
    assert not _flip(layer, "trainable", True)
    caught = _flip(layer, "update_moving_statistics", False)
    assert len(caught) == COMPILES
    for warning in caught:
        assert "update_moving_statistics=False" in str(warning.message)
        assert "does not reach a function of your own" in str(warning.message)
        assert warning.filename == __file__
    # PyTorch's guards compile it anew.
    old = mean if COMPILES else [7.0] * 3
    np.testing.assert_allclose(run(), old, 1e-5)
    layer.moving_mean.assign([7.0] * 3)
    second = compiled()
    np.testing.assert_allclose(second(), [7.0] * 3)
    assert len(_flip(layer, "update_moving_statistics", True)) == COMPILES
    # Nobody has it any more. JAX does not tell.
    del second
    _flip(layer, "update_moving_statistics", False)
    in_use = COMPILES and not frameworks.IS_TENSORFLOW
    assert len(_flip(layer, "update_moving_statistics", True)) == in_use
