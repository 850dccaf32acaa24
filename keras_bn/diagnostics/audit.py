"""Whether the batch normalization of a model is right, and if not, why."""

import dataclasses

from keras_bn.diagnostics import data_checks
from keras_bn.diagnostics import thresholds
from keras_bn.diagnostics import weight_checks
from keras_bn.diagnostics.audit_report import AuditReport
from keras_bn.diagnostics.batches import BATCH_SIZE
from keras_bn.diagnostics.batches import Batches
from keras_bn.diagnostics.initial_values import was_trained
from keras_bn.diagnostics.recalibrate import recalibrated_by
from keras_bn.diagnostics.recalibrate import was_refused
from keras_bn.model_layers import built_batch_normalizations


def audit(
    model,
    data=None,
    labels=None,
    steps=None,
    batch_size=BATCH_SIZE,
    verbose=1,
):
    """Finds batch normalization whose statistics are wrong, and says why.

    Such a model trains well and fails in inference. Without data the weights
    are looked at. With data the verdict rests on the effect: what the model
    puts out in inference is compared with what it does with the statistics of
    each batch, with labels by the loss that the model was compiled with or, of
    classes, by accuracy; what the weights alone make likely, as too few steps
    for the momentum, is then a finding only if there is an effect. Labels also
    tell which remedy is right. Where the batch's statistics do better, the
    moving ones are stale, and `keras_bn.recalibrate` mends them; where
    inference does better, the weights were trained in inference mode, and new
    statistics would destroy the model.

    **The score** is that of `model.evaluate`, as Keras computes it: of one or
    several outputs, by loss weights, sample weights and masks, from losses in
    any form that `compile` takes. Losses that layers add (`add_loss`,
    regularizers) are left out; they are not of the labels. A `compute_loss`
    that the model's class overrides is called instead, whatever it counts. The
    accuracy of classes takes its place where one output has them in its last
    axis, and the loss is a categorical one of Keras, or the labels are one-hot
    or integers of shape `outputs.shape[:-1]`. A model that is not compiled is
    scored by such labels alone.

    The remedy is never the call that was just made: after `recalibrate` in
    this process, also where it refused, it is another.

    Nothing changes: neither weights, seeds and optimizer, nor what the model
    has compiled.

    Args:
        model: `keras.Model` or layer, built; its batch normalization, of ours
            or built into Keras, is found at any depth.
        data: None, or data as the model was trained on or will be used on, in
            any form that `keras_bn.recalibrate` takes; a few thousand samples
            will do. It is read once, arrays in another order; batches of fewer
            than 32 samples are joined. Batches that are sorted by class tell
            little.
        labels: Array of labels, one for each sample of arrays, or a structure
            of them for several outputs; other data brings its own, and sample
            weights if it likes.
        steps: Int, how many batches to read; None: all.
        batch_size: Int, samples in a batch of arrays.
        verbose: 1 for a progress bar while data is read, where the number of
            batches is known; 0 for none.

    Returns:
        `AuditReport`; its `status` is "not trained" where neither gamma, beta
        nor the optimizer ever moved, which accuses no layer.

    Raises:
        ValueError: An argument is not one of the above; the model has no batch
            normalization or is not built; the data is empty, ends before
            `steps`, has values that are not finite or a shape that the model
            does not take; labels are given that are not as many as samples, or
            that cannot be scored.
    """
    layers = built_batch_normalizations("audit", model)
    if data is None and labels is not None:
        raise ValueError(
            "Labels belong to data. Received: data=None, labels of type "
            f"{type(labels).__name__}. Give `data` as well."
        )
    on_data = None
    if data is not None:
        batches = Batches(
            data,
            labels,
            steps,
            batch_size,
            shuffled=True,
            at_least=thresholds.SAMPLES,
            verbose=verbose,
        )
        on_data = data_checks.look_at(
            model, layers, batches, labels is not None
        )
    findings = []
    trained = was_trained(model, layers)
    if trained:
        findings = _findings(model, layers, on_data)
    status = "findings" if findings else "healthy"
    return AuditReport(
        status if trained else "not trained",
        findings,
        on_data.layers if on_data else [],
        on_data.output_gap if on_data else None,
        on_data.scores if on_data else None,
        on_data.samples if on_data else 0,
        all(recalibrated_by(x) for x in layers),
    )


def _findings(model, layers, on_data):
    certain = weight_checks.certain(model, layers)
    likely = weight_checks.likely(model, layers)
    of_data = []
    if on_data is not None:
        cause, remedy = data_checks.cause_and_remedy(on_data)
        # What asked for labelled data has it now.
        certain = [
            dataclasses.replace(one, cause=cause, remedy=remedy)
            if one.remedy == weight_checks.ASK
            else one
            for one in certain
        ]
        # Data says whether these matter, and what helps.
        likely = [
            dataclasses.replace(one, remedy=remedy)
            if one.remedy == weight_checks.RECALIBRATE
            else one
            for one in likely
            if on_data.better is not None
        ]
        of_data = data_checks.findings_of(on_data)
    left = {x.name for x in layers if recalibrated_by(x)}
    refused = was_refused(model, layers)
    return of_data + [
        _not_what_was_tried(one, one.layer in left, refused)
        for one in certain + likely
    ]


def _not_what_was_tried(finding, left, refused):
    """The finding, without a call that would do nothing.

    Args:
        finding: `Finding` of the weights alone.
        left: Whether `recalibrate` left the layer as it is.
        refused: Whether it refused the model as it is.
    """
    if not finding.remedy.startswith("keras_bn.recalibrate("):
        return finding
    if left:
        return dataclasses.replace(
            finding,
            cause="The data that recalibrated the model does not reach the "
            "layer.",
            remedy="model.summary()  # does anything call the layer?",
        )
    if refused and "force=True" not in finding.remedy:
        return dataclasses.replace(finding, remedy=data_checks.TRAIN_AGAIN)
    return finding
