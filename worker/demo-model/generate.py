"""Batched greedy generation with a key/value cache, used to evaluate checkpoints and to write reference continuations."""
import torch

from model import GptOss, dense_attention, import_state


def load_model(config, state, device):
    return import_state(GptOss(config), state).to(device).eval()


class Cache:
    """Keys and values of one layer, [B, G, S, D], filled by the attention functions it hands out."""

    def __init__(self, window, size):
        self.window, self.size, self.k, self.v = window, size, None, None

    def prefill(self, mask):
        def attend(q, k, v, sinks):
            room = (k.shape[0], k.shape[1], self.size, k.shape[3])
            self.k, self.v = k.new_zeros(room), v.new_zeros(room)
            self.k[:, :, :k.shape[2]], self.v[:, :, :v.shape[2]] = k, v
            return dense_attention(q, k, v, sinks, mask)
        return attend

    def step(self, position):
        """Attention of one new token per sequence, at `position` [B]."""
        slots = torch.arange(self.size, device=position.device)
        visible = slots[None] <= position[:, None]
        if self.window:
            visible &= slots[None] > position[:, None] - self.window
        mask = torch.where(visible, 0.0, -1e9)[:, None, None]
        row = torch.arange(len(position), device=position.device)

        def attend(q, k, v, sinks):
            self.k[row, :, position], self.v[row, :, position] = k[:, :, 0], v[:, :, 0]
            return dense_attention(q, self.k, self.v, sinks, mask)
        return attend


@torch.no_grad()
def generate_batch(model, prompts, count, stop):
    """Prompts (lists of ids) -> per prompt (ids up to and including a stop id, gaps between the two best logits)."""
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = int(lengths.max())
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, :len(prompt)] = torch.tensor(prompt)
    ids = ids.to(device)
    position = torch.arange(longest, device=device).expand_as(ids)
    full, sliding = model.masks(position, torch.zeros_like(ids))
    kinds = model.config["layer_types"]
    caches = [Cache(model.config["sliding_window"] if kind == "sliding_attention" else None, longest + count) for kind in kinds]
    attends = [c.prefill(sliding if c.window else full) for c in caches]
    states = model.hidden(ids, position, attends)[0]
    last, at = states[torch.arange(len(prompts), device=device), lengths - 1], lengths
    chosen, gaps, done = [], [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    stop_ids = torch.tensor(sorted(stop), device=device, dtype=torch.long)
    for _ in range(count):
        best = model.lm_head(last).float().topk(2, -1)
        chosen.append(best.indices[:, 0])
        gaps.append(best.values[:, 0] - best.values[:, 1])
        done |= torch.isin(chosen[-1], stop_ids)
        if bool(done.all()) and stop:
            break
        last = model.hidden(chosen[-1][:, None], at[:, None], [c.step(at) for c in caches])[0][:, 0]
        at = at + 1
    out = []
    for tokens, margins in zip(torch.stack(chosen, 1).tolist(), torch.stack(gaps, 1).tolist()):
        end = next((i + 1 for i, t in enumerate(tokens) if t in stop), len(tokens))
        out.append((tokens[:end], margins[:end]))
    return out


def generate(model, prompts, count, stop, batch=128):
    """Like `generate_batch` for any number of prompts; prompts of similar length share a batch."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out = [None] * len(prompts)
    while order:
        size = max(1, min(batch, 160_000 // (len(prompts[order[min(batch, len(order)) - 1]]) + count)))
        part, order = order[:size], order[size:]
        for i, result in zip(part, generate_batch(model, [prompts[i] for i in part], count, set(stop))):
            out[i] = result
    return out
