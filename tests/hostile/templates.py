"""Chat templates that ask for too much."""
from common import packlib

TEMPLATES = {
    "batch": "{{ [1]|batch(999999999,0)|list|length }}",
    "slice": "{{ [1]|slice(999999999)|list|length }}",
    "eq": "{% set ns=namespace(a=[1]) %}{% for i in range(18) %}{% set ns.a=[ns.a,ns.a] %}{% endfor %}"
    "{% for i in range(1000) %}{{ ns.a==ns.a }}{% endfor %}",
    "setbig": "{% set ns=namespace(a=[1]*900000) %}{% for i in range(100000) %}{% set b=ns.a %}{% endfor %}",
    "cat": "{% set s='a'*16000000 %}{% set x=[s,s,s,s,s,s,s,s,s,s]*100 %}{{ x|join|length }}",
    "prec": "{{ '%.70000f' % 1.5 }}",
    "prec2": "{{ '{:.70000f}'.format(1.5) }}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(100000) }}",
    "caller": "{% macro f() %}{{ caller() }}{% endmacro %}"
    "{% macro g() %}{% call f() %}{{ g() }}{% endcall %}{% endmacro %}{{ g() }}",
    "loop": "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "tojson": "{{ ([messages]*1000)|tojson(indent='a'*100000)|length }}",
    "expand": "{{ ('\t'*10000000).expandtabs(1000)|length }}",
    "replace": "{% set s='a'*1000000 %}{{ s.replace('','b'*1000000)|length }}",
    "pow": "{{ 9**9**9**9 }}",
    "group": "{{ range(100000)|list|groupby('x')|list|length }}",
    "sort": "{% set ns=namespace(a=['a'*1000000]*100000) %}{{ ns.a|sort|length }}",
    "include": "{% include 'x' %}",
    "extends": "{% extends 'x' %}",
    "str": "{% for i in range(100000) %}{{ 'a'*16000000 }}{% endfor %}",
    "uniq": "{{ range(100000)|list|unique|list|length }}",
    "center": "{{ 'a'.center(999999999) }}",
    "len": "{% set s='é'*8000000 %}{% for i in range(100000) %}{{ s|length }}{% endfor %}",
}


def cases(bench):
    def case(template):
        def run(work):
            pack = work / "p.nf4pack"
            pack.write_bytes(packlib.with_file(bench.base, "chat_template.jinja", template))
            return bench.judge(bench.run(["generate", pack, "--chat", "--max-tokens", 1], stdin=b"hello\n"))

        return run

    return [(name, case(template)) for name, template in TEMPLATES.items()]
