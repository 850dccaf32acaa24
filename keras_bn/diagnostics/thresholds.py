"""Above what `audit` finds something, and `recalibrate` refuses.

Calibrated on healthy models: see BUILD_NOTES.md, "Thresholds of the audit".
"""

# Accuracy, or logarithm of the loss, that is lost in the worse mode.
SCORE_LOST = 0.05
