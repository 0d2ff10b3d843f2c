"""B + G → the verdict on each image, by Keras or ONNX; its figures; the repair record."""
