"""Each check of the dataset doctor: captions, copies, pixels, repeated marks, losses of a run."""
