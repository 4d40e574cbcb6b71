"""Where else a run is shown: TensorBoard, Weights & Biases, webhooks."""
