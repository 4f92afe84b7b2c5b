"""Vision-language models: a Hub id, a local folder, or a LLaVA around the embedded SmolLM2 for offline trials."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from rotatekv.compat import check_versions
from rotatekv.errors import UserError
from rotatekv.models.hub import hub_is_offline
from rotatekv.models.text import (
    DTYPES,
    EMBEDDED_MODEL,
    LOAD_ERRORS,
    WEIGHTS,
    check_placement,
    explain_load_error,
    known_weights,
    load_model,
)
from rotatekv.models.weights import files_digest

RANDOM_LLAVA = "llava-random-smollm2"
VISION_ALIASES = {
    "llava1.5_7b": "llava-hf/llava-1.5-7b-hf",
    "llava1.5_13b": "llava-hf/llava-1.5-13b-hf",
    "llava_next_mistral_7b": "llava-hf/llava-v1.6-mistral-7b-hf",
}
# A special token SmolLM2's chats never use: no embedding has to be added.
_RANDOM_IMAGE_TOKEN = "<filename>"
_RANDOM_IMAGE_SIZE, _PATCH_SIZE = 168, 14  # 12 × 12 tokens per picture


def load_vision_model(
    name: str,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
    attn_implementation: str = "sdpa",
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a vision-language model, in eval mode, and its processor; the arguments are ``load_model``'s.

    Raises:
        UserError: an unknown model, one without pictures, a bad dtype or device.
    """
    check_versions()
    if name == RANDOM_LLAVA:
        return random_llava(*load_model(EMBEDDED_MODEL, dtype, device, device_map, attn_implementation))
    target = check_placement(dtype, device, device_map, attn_implementation)
    folder = VISION_ALIASES.get(name, name)
    if not Path(folder).is_dir():
        hub_is_offline()  # without a network, fail at once
    options = {"dtype": DTYPES.get(dtype, "auto"), "attn_implementation": attn_implementation}
    weights = files_digest(folder)
    try:
        processor = AutoProcessor.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder, **options, device_map=device_map)
        model = model.to(target) if target is not None else model
    except LOAD_ERRORS as error:
        raise UserError(explain_load_error(name, error)) from None
    if not hasattr(processor, "image_token") or not hasattr(processor, "tokenizer"):
        raise UserError(f"{name} takes no pictures: choose {RANDOM_LLAVA}, {', '.join(VISION_ALIASES)} or a LLaVA")
    setattr(model, WEIGHTS, weights)
    return model.eval(), processor


def random_llava(
    text: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, image_token: str = _RANDOM_IMAGE_TOKEN
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA with ``text`` as its text model, a small random vision tower and a random projector, always the same.

    What it says of a picture means nothing; what it makes the cache hold is real.

    Args:
        text: a LLaMA or Mistral causal model; its weights are shared, not copied.
        image_token: a token of the tokenizer that no text contains.
    """
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=_RANDOM_IMAGE_SIZE,
        patch_size=_PATCH_SIZE,
    )
    image_id = tokenizer.convert_tokens_to_ids(image_token)
    config = LlavaConfig(vision_config=vision, text_config=text.config, image_token_index=image_id)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        attention = text.config._attn_implementation
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention, dtype=torch.float32)
        _spread(model.model.multi_modal_projector, text.get_input_embeddings().weight.float().std().item())
    model = model.to(device=text.device, dtype=text.dtype)
    model.model.language_model, model.lm_head = text.model, text.lm_head
    model.generation_config = text.generation_config
    setattr(model, WEIGHTS, known_weights(text))
    # The last part names the text model, whose reorder indices hold here too.
    model.name_or_path = config._name_or_path = f"llava-random/{text.name_or_path.rstrip('/').rsplit('/', 1)[-1]}"
    return model.eval(), LlavaProcessor(
        _image_processor(),
        tokenizer,
        patch_size=_PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token=image_token,
        num_additional_image_tokens=1,
    )


def _spread(projector: torch.nn.Module, std: float) -> None:
    """Give a random projector outputs as large as word embeddings, so that pictures differ in the text model."""
    weight = projector.linear_1.weight
    with torch.no_grad():
        states = torch.randn(256, weight.shape[1], dtype=weight.dtype, device=weight.device)
        projector.linear_2.weight.mul_(std / projector(states).std())


def _image_processor():
    from transformers import CLIPImageProcessorPil  # needs no torchvision

    size = _RANDOM_IMAGE_SIZE
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
