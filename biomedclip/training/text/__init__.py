"""A text tower that learns the language of the field from a sentence encoder, before it sees a picture.

`config` says what a run may be, `teacher` what the encoder makes of the sentences, `train` fits the tower.
"""
