"""The workshop: turns a trained GPT-2 checkpoint into a package. Read `export.convert` first.

Imports the other two rooms, numpy, onnx, google-crc32c, huggingface_hub, tokenizers and tqdm. Not needed on the device.
"""
