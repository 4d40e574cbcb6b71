"""Steps of kind full: with whole copies of the model, and with weights that are shared out."""
