"""A Switch Transformers encoder with a sequence classification head, which transformers itself does not offer."""

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import SwitchTransformersConfig
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersPreTrainedModel,
    SwitchTransformersStack,
)
from transformers.utils import can_return_tuple


@dataclass
class SwitchSequenceClassifierOutput(SequenceClassifierOutput):
    """``SequenceClassifierOutput`` and the routers' logits, one [batch, tokens, experts] tensor for each MoE layer."""

    router_logits: tuple[torch.FloatTensor, ...] | None = None


class SwitchTransformersForSequenceClassification(SwitchTransformersPreTrainedModel):
    """Encoder, mean over the tokens that are not padding, dropout and one linear layer.

    The encoder is laid out as in transformers' ``SwitchTransformersEncoderModel`` (``shared``, ``encoder``), so the two
    read each other's encoder weights. ``config.num_labels`` gives the number of classes; one label a sequence.
    """

    _tied_weights_keys = {"encoder.embed_tokens.weight": "shared.weight"}  # noqa: RUF012 (transformers' own form)

    def __init__(self, config: SwitchTransformersConfig):
        super().__init__(config)
        if config.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"config.problem_type is {config.problem_type!r}; this head supports 'single_label_classification' "
                "only: leave problem_type unset"
            )
        self.num_labels = cast(int, config.num_labels)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        encoder_config = copy.deepcopy(config)
        encoder_config.use_cache = False
        encoder_config.is_encoder_decoder = False
        self.encoder = SwitchTransformersStack(encoder_config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.classifier = nn.Linear(config.d_model, self.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        factor = self.config.initializer_factor
        if module is self:
            init.normal_(self.shared.weight, mean=0.0, std=factor)
        elif module is getattr(self, "classifier", None):
            init.normal_(self.classifier.weight, mean=0.0, std=factor * self.config.d_model**-0.5)
            init.zeros_(self.classifier.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        self.shared = cast(nn.Embedding, new_embeddings)
        self.encoder.set_input_embeddings(new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> SwitchSequenceClassifierOutput:
        """Classify each sequence.

        Args:
            input_ids: [batch, tokens] integers, padded on either side.
            attention_mask: [batch, tokens], 1 for a token and 0 for padding. Without it nothing counts as padding.
            inputs_embeds: [batch, tokens, d_model], instead of ``input_ids``.
            labels: [batch] class indices; the loss is their mean cross entropy (-100 is left out).
            kwargs: what the encoder takes: ``output_hidden_states``, ``output_attentions``, ``output_router_logits``.

        Returns:
            ``logits`` [batch, num_labels]; ``loss`` if labels were given; the other fields if they were asked for.

        Raises:
            ValueError: both or neither of ``input_ids`` and ``inputs_embeds``, a mask or labels of another shape, a
                sequence without any token.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"expected exactly one of input_ids and inputs_embeds, got {given}")
        tokens = input_ids if input_ids is not None else inputs_embeds
        assert tokens is not None  # for the type checker: exactly one was given
        shape = tuple(tokens.shape[:2])
        if attention_mask is not None and tuple(attention_mask.shape) != shape:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected {shape} as the input")
        if labels is not None and tuple(labels.shape) != shape[:1]:
            raise ValueError(f"labels has shape {tuple(labels.shape)}, expected {shape[:1]}: one class a sequence")
        kwargs["use_cache"] = False

        encoded = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        hidden = encoded.last_hidden_state
        pooled = hidden.mean(dim=1) if attention_mask is None else masked_mean(hidden, attention_mask)
        logits = self.classifier(self.dropout(pooled))

        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.float(), labels)
        return SwitchSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            router_logits=encoded.router_logits,
        )


def masked_mean(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean of ``hidden`` [batch, tokens, d_model] over the tokens whose mask is not 0, summed in fp32.

    Padding is cut out rather than multiplied by 0, so that a NaN there cannot reach the result.
    Raises ValueError for a sequence without any token.
    """
    keep = attention_mask.to(torch.bool).unsqueeze(-1)
    count = keep.sum(dim=1)
    if hidden.device.type == "cpu" and not bool((count > 0).all()):
        row = int((count.squeeze(-1) == 0).nonzero()[0, 0])
        raise ValueError(f"attention_mask row {row} is all 0, expected at least one token in each sequence")
    total = torch.where(keep, hidden, hidden.new_zeros(())).sum(dim=1, dtype=torch.float32)
    return (total / count).to(hidden.dtype)
