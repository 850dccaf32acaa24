"""Above what `audit` finds something, and `recalibrate` refuses.

Calibrated on healthy models: see BUILD_NOTES.md, "Thresholds of the audit".
"""

# Accuracy, or logarithm of the loss, that is lost in the worse mode, beyond
# this many standard errors of the difference.
SCORE_LOST = 0.05
STANDARD_ERRORS = 2.0

# What a moving average costs that lags behind weights which are learning
# fast: of the accuracy as log odds (0.2 at 0.6, 0.05 at 0.95), of the loss as
# its logarithm. More than this, and than the above, has to be lost in
# inference; where the statistics of the batch do worse it is no excuse.
LOST_BY_LAG = 0.8

# Root mean square of the difference between the outputs in inference and with
# the batch's statistics, in standard deviations of the outputs.
OUTPUT_GAP = 0.7

# How far the moving statistics of a layer are from its inputs in inference:
# of the mean in standard deviations, of the variance as log ratio. Below both
# in all layers, whatever the modes differ by is not due to the statistics, but
# to batches that are small or sorted. Below both with the statistics of
# batches, each layer has those that it should have, and a gap between the
# outputs is the sum of many small ones; then it takes a score that is lost.
MEAN_DISTANCE = 0.5
VARIANCE_LOG_RATIO = 0.5

# The same, of statistics which a recalibration by batches would leave as they
# are, but for what other batches of the same data differ by.
AS_RECALIBRATED = 0.1

# Samples in a batch: smaller ones are joined, as their moments are too coarse.
SAMPLES = 32

# Of the weight that the moving statistics' initial values have.
INITIAL_SHARE = 0.05

# Of the channels of a layer.
SHARE_WITHOUT_VARIANCE = 0.75
SHARE_DEAD = 0.5

# Of epsilon. Healthy layers have all their variances below epsilon itself; a
# variance below this leaves of a channel less than 3% of its deviations.
NO_VARIANCE = 1e-3

# A channel whose |gamma| is below it is dead.
DEAD_GAMMA = 1e-3

# Powers of ten between the largest and the smallest, of |gamma| in channels
# that are not dead and of moving variance + epsilon.
GAMMA_ORDERS = 4.0
VARIANCE_ORDERS = 10.0

# Largest difference between replicas, in parts of the largest value.
REPLICAS_DISAGREE = 1e-4
