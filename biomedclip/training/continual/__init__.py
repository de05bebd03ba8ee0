"""Learning new material without losing the old: the terms that a run can add to its loss, and what they share."""
