"""How a Switch encoder routes given sentences: how evenly, how many experts a sentence touches, how predictably."""

import torch

from examples.corpus import MAX_TOKENS, Sentence
from examples.grouped_experts import grouped_experts


@torch.no_grad()
def trace(model, tokenizer, sentences: list[Sentence], batch_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [tokens], sentence number and chosen experts [tokens, 1 + MoE layers] of all tokens but padding."""
    ids, choices = [], []
    with grouped_experts():
        for start in range(0, len(sentences), batch_size):
            texts = [s.text for s in sentences[start : start + batch_size]]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            real = batch["attention_mask"].bool()
            encoded = model.encoder(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True
            )
            experts = [layer.argmax(-1)[real] for layer in encoded.router_logits]
            number = (torch.arange(len(texts)) + start).unsqueeze(1).expand_as(real)[real]
            ids.append(batch["input_ids"][real])
            choices.append(torch.stack([number, *experts], dim=1))
    return torch.cat(ids), torch.cat(choices)


def routing_report(
    model, tokenizer, known: tuple[torch.Tensor, torch.Tensor], sentences: list[Sentence]
) -> dict[str, object]:
    """Figures over `sentences` for each MoE layer; the token-id table counts over `known`, a trace."""
    experts = model.config.num_experts
    ids, choices = trace(model, tokenizer, sentences)
    known_ids, known_choices = known
    entropy, share, touched, hits = [], [], [], {1: [], 3: []}
    for layer in range(1, choices.shape[1]):
        chosen = choices[:, layer]
        usage = chosen.bincount(minlength=experts).double() / len(chosen)
        entropy.append(-(usage * usage.clamp_min(1e-12).log()).sum().item() / torch.tensor(float(experts)).log().item())
        share.append(usage.max().item())
        distinct = torch.stack([choices[:, 0], chosen], 1).unique(dim=0)
        touched.append(len(distinct) / len(sentences) / experts)
        # A token never seen gets the experts that are the most common ones over all tokens.
        table = torch.zeros(len(tokenizer), experts)
        table.index_put_((known_ids, known_choices[:, layer]), torch.ones(len(known_ids)), accumulate=True)
        table += known_choices[:, layer].bincount(minlength=experts) / len(known_ids) * 1e-3
        best = table.topk(3, dim=1).indices[ids]
        for k, values in hits.items():
            values.append((best[:, :k] == chosen.unsqueeze(1)).any(1).float().mean().item())
    return {
        "tokens": len(ids),
        "usage_entropy": [round(value, 4) for value in entropy],
        "largest_share_of_one_expert": [round(value, 4) for value in share],
        "experts_touched_by_a_sentence": [round(value, 4) for value in touched],
        "token_table_top1": [round(value, 4) for value in hits[1]],
        "token_table_top3": [round(value, 4) for value in hits[3]],
        "mean_token_table_top1": round(sum(hits[1]) / len(hits[1]), 4),
        "mean_token_table_top3": round(sum(hits[3]) / len(hits[3]), 4),
    }
