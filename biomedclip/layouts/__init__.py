"""A labelled data set on disk, in any common layout, to one Manifest table; builders and evaluation share it."""
