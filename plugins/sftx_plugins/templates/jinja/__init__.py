"""The template plugin that renders the tokenizer's own Jinja chat template and finds what of it is trained.

A chat template gives one string, without saying which characters are markup, which come from the row, and which are to
be trained. This package finds that out by rendering a conversation twice: with a placeholder for each text, and as it
is.

>>> from tokenizers import AddedToken
>>> from sftx import Conversation, Message
>>> from sftx_plugins.templates.jinja.parts import Scanner, fill
>>> from sftx_plugins.templates.jinja.placeholders import MessageFormat, Verbatim, to_chat_data, with_placeholders
>>> from sftx_plugins.templates.jinja.probes import probe
>>> from sftx_plugins.templates.jinja.regions import ChatTemplate, RegionFinder

A small chat template, and a conversation in which the user spells a control token:

>>> chat_template = ChatTemplate(
...     "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
...     "{% if add_generation_prompt %}<assistant>{% endif %}", {}, None)
>>> conversation = Conversation((Message("user", "Say <end>!"), Message("assistant", "Gladly.")))

1. Substitute (`placeholders.py`). Each text becomes one letter of CJK Extension B, which filters such as `trim` or
`tojson` leave alone.

>>> data, placeholders = with_placeholders(conversation, MessageFormat())
>>> data.messages
[{'role': 'user', 'content': '𠀀'}, {'role': 'assistant', 'content': '𠀁'}]
>>> placeholders.texts
['Say <end>!', 'Gladly.']

2. Render. Every other character is the template's own markup.

>>> chat_template.render(data, prompt=False)
'<user>𠀀<end><assistant>𠀁<end>'

3. Split the rendering into parts (`parts.py`): control tokens, other markup and placeholders.

>>> scanner = Scanner({token: AddedToken(token) for token in ("<system>", "<user>", "<assistant>", "<end>")})
>>> parts = scanner.parts(chat_template.render(data, prompt=False), placeholders.repeats)
>>> [(part.text, part.control, part.placeholder) for part in parts[:3]]
[('<user>', True, None), ('𠀀', False, 0), ('<end>', True, None)]

4. Find the trained region of each answer (`regions.py`). It begins where the turns before it with the generation prompt
end, `'<user>𠀀<end><assistant>'`, and goes on to the stop token. `probes.py` has found that token, and other properties
of the template, by rendering a few conversations of its own.

>>> finder, rewrites_history = probe(RegionFinder(chat_template, scanner))
>>> finder.stop, rewrites_history
(('<end>',), False)
>>> rendering, regions = finder.trained_regions(finder.skeleton(conversation))
>>> [rendering.text[region.start : region.end] for region in regions]
['𠀁<end>']

5. Fill in the texts. The result must equal the rendering of the conversation itself, character for character; otherwise
the template depends on what a text says, and the row is refused.

>>> expected = chat_template.render(to_chat_data(conversation, MessageFormat(), Verbatim()), prompt=False)
>>> fill(rendering.parts, rendering.text, placeholders, expected)
['<user>', 'Say <end>!', '<end>', '<assistant>', 'Gladly.', '<end>']

`template.py` makes a segment of each part, trained if it is inside a region. The user's `<end>` is part of a text and
stays text; the other two are control tokens. `tokenizer.py` is the plugin with its options.

Modules here import the public names of `sftx` and each other; `tokenizer.py` imports the others inside functions alone.
"""
