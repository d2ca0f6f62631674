"""What clients of transformers 4 write with an exported folder, as JSON: `tests/test_clients.py` runs it.

.venv/transformers-4/bin/python tests/older_clients.py EXPORTED PROMPT
"""

import json
import sys

import torch
from optimum.intel import OVModelForCausalLM
from optimum.onnxruntime import ORTModelForCausalLM
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(folder: str):
    """The model of a folder in each client."""
    yield "transformers", AutoModelForCausalLM.from_pretrained(folder)
    yield "onnxruntime", ORTModelForCausalLM.from_pretrained(folder, export=True)
    float32 = {"INFERENCE_PRECISION_HINT": "f32"}
    yield "openvino", OVModelForCausalLM.from_pretrained(folder, export=True, ov_config=float32)
    model = AutoModelForCausalLM.from_pretrained(folder)
    quantize_(model, Int8WeightOnlyConfig())
    yield "torchao", model


if __name__ == "__main__":
    folder, prompt = sys.argv[1:]
    inputs = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    answers = {}
    for name, model in load(folder):
        with torch.no_grad():
            logits = model(**inputs).logits[0]  # (time, vocab)
            ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers[name] = {"logits": logits.tolist(), "ids": ids.tolist()}
    print("ANSWERS" + json.dumps(answers))
