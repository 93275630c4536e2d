"""ONNX graphs: written from a simulated model, read, calibrated and quantized, and run to check them."""
