"""The forms of the `UPDATE_OPS` pitfall, and the arms of each.

An arm trains condition 9 of the article, wrongly or rightly; all arms have
the same images in the same order, the same batches and the same optimizer.
"""

import dataclasses
from importlib.util import find_spec

import numpy as np

from experiments import ExperimentError

CONDITION = 9
# Momentum 0.99 to this power is 0.6: so much is left of the initial values.
FEW_STEPS = 50
# What each channel of the shifted images has left of its brightness.
SHIFT = (0.6, 0.4, 0.2)

# From the framework of a form to the packages it needs. None: any backend.
_PACKAGES = {
    "tensorflow1": ("tensorflow", "tf_keras"),
    "tensorflow": ("tensorflow",),
    "jax": ("jax",),
    "torch": ("torch",),
    None: (),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        form: its letter.
        name: of its files and of its line of results.
        title: what it does.
        right: whether its moving statistics are those of its weights.
        model: name of the arm whose training this one takes over; by default
            its own.
    """

    form: str
    name: str
    title: str
    right: bool
    model: str = ""

    @property
    def trained_as(self) -> str:
        return self.model or self.name


@dataclasses.dataclass(frozen=True)
class Form:
    """One form of the pitfall.

    Attributes:
        letter: its name, as in the flag.
        title: what it is.
        framework: whose program it is: "tensorflow1" (graphs and sessions),
            "tensorflow", "jax", "torch", or None for `fit` on any backend.
        arms: the `Arm`s, wrong ones first.
    """

    letter: str
    title: str
    framework: str | None
    arms: tuple[Arm, ...]

    def missing(self) -> list[str]:
        """Returns the packages that it needs and that are not installed."""
        return [x for x in _PACKAGES[self.framework] if not find_spec(x)]


def _form(letter, title, framework, *arms):
    return Form(
        letter, title, framework, tuple(Arm(letter, *arm) for arm in arms)
    )


FORMS = {
    form.letter: form
    for form in (
        _form(
            "a",
            "TensorFlow 1, UPDATE_OPS",
            "tensorflow1",
            ("a_without", "without the two lines", False),
            ("a_control_dependencies", "with control_dependencies", True),
            ("a_session_run", "with sess.run(extra_update_ops)", True),
        ),
        _form(
            "b",
            "JAX, stateless_call",
            "jax",
            ("b_dropped", "non-trainable variables dropped", False),
            ("b_kept", "non-trainable variables kept", True),
        ),
        _form(
            "c",
            "TensorFlow, GradientTape",
            "tensorflow",
            ("c_inference", "without training=True", False),
            ("c_training", "with training=True", True),
        ),
        _form(
            "d",
            "PyTorch, a loop",
            "torch",
            ("d_inference", "model.train(), then model(x)", False),
            ("d_training", "model(x, training=True)", True),
        ),
        _form(
            "e",
            "steps for momentum 0.99",
            None,
            ("e_few_steps", f"{FEW_STEPS} steps", False),
            ("e_enough", "all steps", True),
        ),
        _form(
            "f",
            "used on darker, tinted images",
            None,
            ("f_other_data", "trained on the usual images", False, "e_enough"),
            ("f_same_data", "trained on such images", True),
        ),
    )
}
ARMS = {arm.name: arm for form in FORMS.values() for arm in form.arms}


def parse(letters: list[str]) -> list[Form]:
    """Returns the forms of some letters, each once, in order.

    Raises:
        ExperimentError: there is none, or one is unknown.
    """
    for letter in letters:
        if letter not in FORMS:
            raise ExperimentError(
                f"forms are letters of {','.join(FORMS)}. Received: {letter!r}"
            )
    if not letters:
        raise ExperimentError("give forms, such as --forms=a,b")
    return [form for letter, form in FORMS.items() if letter in letters]


def training_steps(name: str, steps: int) -> int:
    """Returns the steps that the training of a name takes.

    Args:
        name: `trained_as` of an arm.
        steps: those of all trainings but the one of few steps.
    """
    return min(FEW_STEPS, steps) if name == "e_few_steps" else steps


def shift(images: np.ndarray) -> np.ndarray:
    """Returns images in darker, tinted light.

    Args:
        images: uint8 (..., 3).
    """
    return np.rint(images * np.array(SHIFT, np.float32)).astype(np.uint8)
