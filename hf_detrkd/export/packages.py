"""Imports the ONNX packages, which the extra `export` installs."""

try:
    import onnx
    import onnx_ir
    import onnxruntime
    import onnxscript  # noqa: F401  # torch's exporter needs it
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxruntime.transformers.float16 import convert_float_to_float16
except ImportError as error:
    raise ImportError(
        f"ONNX export needs onnx, onnxscript and onnxruntime ({error}): pip install 'hf-detrkd[export]', or in a "
        "checkout pip install '.[export]'."
    ) from error


__all__ = ["ClearMetadataAndDocStringPass", "convert_float_to_float16", "onnx", "onnx_ir", "onnxruntime"]
