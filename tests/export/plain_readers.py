"""What others make of an exported folder, in a process that cannot import sptnet: usage: FOLDER PIXELS.npz OUT.npz."""

import importlib.util
import sys

folder, pixels, out, *site = sys.argv[1:]
sys.path.extend(site)  # packages, without what is installed editable beside them
assert importlib.util.find_spec("sptnet") is None

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline  # noqa: E402

images = torch.from_numpy(np.load(pixels)["images"])
found = {}
with torch.no_grad():
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    token = model.forward_head(model.forward_features(images), pre_logits=True)
    found["timm"], found["timm_token"] = model(images), token
    wrapped = AutoModelForImageClassification.from_pretrained(folder)
    found["transformers"] = wrapped(pixel_values=images).logits
    program = torch.export.load(f"{folder}/model.pt2").module()(images)
    found |= {f"pt2_{name}": value for name, value in program.items()}
session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
found |= {
    f"onnx_{name}": value for name, value in zip(names, session.run(None, {"images": images.numpy()}), strict=True)
}
np.savez(out, **{name: np.asarray(value) for name, value in found.items()})

transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.fromarray((np.arange(40 * 50 * 3) % 251).astype(np.uint8).reshape(40, 50, 3))
ours = AutoImageProcessor.from_pretrained(folder)(image)["pixel_values"][0]
assert torch.equal(torch.as_tensor(ours), transform(image))
answer = pipeline("image-classification", folder)(image)[0]
with torch.no_grad():
    assert answer["label"] == wrapped.config.id2label[int(model(transform(image)[None]).argmax())]
print(transform)
