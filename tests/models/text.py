"""The texts in the test models: an English passage to learn words from, and chat templates."""

from __future__ import annotations

from typing import Final

PASSAGE: Final = """\
The old harbour wakes before the sun does. A boat comes in with the night on its nets, and a man on the
wall calls out to it. He asks how the water was, and they say it was kind. Then the gulls begin, the bread
is carried down the hill, and every door on the street stands open to the wind. By noon the light is white
and hard. The women who mend sails sit in the shade of the long wall and tell each other the same story,
and each time the story is a little different. A child may ask which one is true. All of them, they say,
and none of them, and now go and see if the tide has turned.

In the evening people walk along the quay, for no reason but to look at the sea and at each other. Some
talk about money, some about rain, some about a house they will build when there is time. A dog follows
whoever has fish. The lamp at the end of the pier is lit, though no one has seen the hand that lights it,
and its slow beam goes over the roofs, over the field behind the church, over the road to the city. If you
stay long enough you learn to count by it. One, two, three, dark. One, two, three, dark.

When winter comes the boats are pulled up on the sand and the paint is scraped from them. It is good work
for cold hands. They drink hot tea from a blue pot and think of summer. What did the user ask? What did the
assistant answer? Nobody in the town would know what a system is, but they know how a rope is made, and why
a knot holds, and that a small mistake in the morning is a large one by night. So they are careful, and
they are not in a hurry. First you do this, then you do that, and then you wait. Most of life is like the
harbour: things go out, things come back, and it is never quite the same water twice.
"""

CHATML: Final = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""ChatML without a BOS of its own: the tokenizer adds it."""

CHATML_WITH_BOS: Final = "{{- bos_token -}}" + CHATML
"""ChatML that writes the BOS itself, so that whoever tokenizes must not add a second one."""

RAISING: Final = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{{- raise_exception('this template takes no system message') -}}"
    "{%- endif -%}"
) + CHATML
"""Renders most conversations, and calls `raise_exception` for one that opens with a system message."""

BROKEN: Final = "{%- for message in messages -%}{{- message['content'] -}}"
"""Does not parse: the loop is never closed."""
