"""Examine a dataset before it is trained: copies, blurry, dark and small images, repeated marks, captions."""
