"""Small chat templates, one of each form that the families of models use, and a tokenizer for each."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from tests.data_helpers import CHATML, tiny_tokenizer


@dataclass(frozen=True)
class Family:
    """A template, its special tokens and which of them is EOS."""

    template: str | None
    eos: str
    specials: tuple[str, ...] = ()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = tiny_tokenizer(self.template)
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.specials)})
        tokenizer.eos_token = self.eos
        return tokenizer


IM = ("<|im_start|>", "<|im_end|>")
TRIMS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# ChatML with tools as Qwen2.5 has them: results of tools are the user's.
CHATML_TOOLS = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools><|im_end|>\n"
    "{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}<|start_header_id|>"
    "{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if m.role == 'tool' %}{{ m.content | tojson }}"
    "{% elif m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{% if tools and loop.first %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'system' %}{% if not loop.first %}"
    "{{ raise_exception('system must be first') }}{% endif %}"
    "{% elif m.role == 'user' %}[INST] {% if loop.index0 == 1 and messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{% if m.tool_calls %}{{ raise_exception('no tool calls here') }}{% endif %}"
    " {{ m.content }}</s>{% else %}{{ raise_exception('unknown role ' ~ m.role) }}{% endif %}{% endfor %}"
)
MINISTRAL = (
    "{{ '<s>' }}{% if messages[0].role != 'system' %}[SYSTEM_PROMPT]Think first.[/SYSTEM_PROMPT]{% endif %}"
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% else %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'thinking' %}[THINK]{{ part.thinking }}[/THINK]{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]"
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}{% endfor %}</s>"
    "{% endif %}{% endfor %}"
)
# The prompt opens the thought; a history without one is written bare.
MINISTRAL_OPENS = MINISTRAL + "{% if add_generation_prompt %}[THINK]{% endif %}"
GEMMA = (
    "{{ '<s>' }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
_QWEN_TURN = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}"
    "{% set thought = m.reasoning_content or '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (LAST) %}<think>\n{{ thought | trim }}\n</think>\n\n{% endif %}"
    "{{ content | trim }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}{{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>{{ m.content }}"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n"
    "{% if tools and loop.first %}{{ tools | tojson }}\n{% endif %}{{ m.content | trim }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nOPENS{% endif %}"
)
# Thinking is asked for, earlier thoughts go, and a last answer without one gets an empty one.
QWEN_THINKING = _QWEN_TURN.replace("LAST", "true").replace("OPENS", "<think>\n")
# Qwen3's: thinking is left to the model.
QWEN_HYBRID = _QWEN_TURN.replace("LAST", "loop.last or thought").replace("OPENS", "")
# Thoughts are never written, though the prompt opens one.
DEEPSEEK_R1 = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<|User|>"
    "{{ m.content }}{% elif m.role == 'assistant' %}{% if m.tool_calls %}<|Assistant|>"
    "{% for c in m.tool_calls %}{{ '<|call|>' + c.function.name + '\\n' + c.function.arguments }}{% endfor %}<|end|>"
    "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}"
    "{% else %}<|output|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# The prompt closes the thought at once, and so does the history.
DEEPSEEK_V3 = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<|User|>"
    "{{ m.content }}{% else %}<|Assistant|></think>{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|></think>{% endif %}"
)
# A bare answer gets an empty thought on one line, which the prompt's opening is not the beginning of.
NEMOTRON = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% if m.reasoning_content %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n{% elif '<think>' not in m.content %}<think></think>{% endif %}"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# gpt-oss's: an answer has a channel, a thought is a message before it, and the last turn ends with another token.
CHANNELS = (
    "<|start|>system<|message|>You are a model.<|end|>"
    "{% if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.tool_calls %}"
    "<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% else %}"
    "{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% endif %}{% elif m.role == 'tool' %}<|start|>functions to=assistant<|message|>{{ m.content | tojson }}<|end|>"
    "{% else %}<|start|>{{ 'developer' if m.role == 'system' else m.role }}<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# The channel stands before the last answer only.
LAST_CHANNEL = (
    "{% for m in messages %}<|start|>{{ m.role }}"
    "{% if m.role == 'assistant' and loop.last %}<|channel|>final{% endif %}<|message|>{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# Turns have no end: the next role's token follows.
GLM = (
    "[gMASK]<sop>{% if tools %}<|system|>\n{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|observation|>\n<tool_response>{{ m.content }}</tool_response>"
    "{% elif m.role == 'assistant' %}<|assistant|>\n<think>"
    "{{ m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1] | trim "
    "if '</think>' in m.content else '') }}</think>\n{{ m.content.split('</think>')[-1] | trim }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}{% for k, v in c.function.arguments.items() %}"
    "<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value>{% endfor %}</tool_call>{% endfor %}"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

FAMILIES = {
    "chatml": Family(CHATML, "<|im_end|>"),
    "chatml, trimmed": Family(TRIMS, "<|im_end|>"),
    "chatml, tools": Family(CHATML_TOOLS, "<|im_end|>"),
    "chatml, another EOS": Family(CHATML, "<|endoftext|>", ("<|endoftext|>",)),
    "llama-3": Family(
        LLAMA_3, "<|eot_id|>", ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    ),
    "mistral": Family(MISTRAL, "</s>", ("</s>", "[INST]", "[/INST]")),
    "ministral": Family(MINISTRAL, "</s>", ("</s>", "[INST]", "[/INST]", "[THINK]", "[/THINK]", "[TOOL_CALLS]")),
    "ministral, opened": Family(MINISTRAL_OPENS, "</s>", ("</s>", "[INST]", "[/INST]", "[THINK]", "[/THINK]")),
    "gemma": Family(GEMMA, "<eos>", ("<eos>", "<start_of_turn>", "<end_of_turn>")),
    "phi-3": Family(PHI_3, "<|endoftext|>", ("<|endoftext|>", "<|end|>", *ROLES)),
    "qwen, thinking": Family(QWEN_THINKING, "<|im_end|>"),
    "qwen, hybrid": Family(QWEN_HYBRID, "<|im_end|>"),
    "deepseek-r1": Family(DEEPSEEK_R1, "<|end|>", ("<|User|>", "<|Assistant|>", "<|end|>")),
    "deepseek-v3": Family(DEEPSEEK_V3, "<|end|>", ("<|User|>", "<|Assistant|>", "<|end|>")),
    "nemotron": Family(NEMOTRON, "<|im_end|>"),
    "gpt-oss": Family(
        CHANNELS, "<|return|>", ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>")
    ),
    "last channel": Family(LAST_CHANNEL, "<|end|>", ("<|start|>", "<|end|>", "<|message|>", "<|channel|>")),
    "glm": Family(GLM, "<|endoftext|>", ("<|endoftext|>", "[gMASK]", "<sop>", *ROLES)),
    "plain": Family(PLAIN, "<|im_end|>"),
    "no template": Family(None, "<|im_end|>"),
}
