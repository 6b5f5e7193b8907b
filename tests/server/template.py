"""A chat template in the manner of V3.1's."""

# ruff: noqa: RUF001 - DeepSeek writes its markers with full-width bars

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' and m.tool_calls is defined %}"
    "{% for c in m.tool_calls %}<｜tool▁call▁begin｜>{{ c.function.name }}<｜tool▁sep｜>"
    "{{ c.function.arguments }}<｜tool▁call▁end｜>{% endfor %}"
    "{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<answer>"
    "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
)
