"""Requests of which two readers may see different ends, hosts or meanings, each with another request hidden where one of them would find it.

What is right is RFC 9112's and RFC 9110's word, not tidegate's:

- `REFUSE`: must or should be refused; nothing of it may be a whole request at a backend, and what stands behind it is nobody's request.
- `PASS`: is legal, and has one meaning. It reaches the backend, and the connection goes on.
- `EITHER`: may be refused, or repaired: the backend gets it in a form that has one meaning only.

`@@@@@` stands for the number of the attempt. The hidden request asks for /canary/, which is not for the backend that the others are for.
"""

from dataclasses import dataclass

REFUSE, PASS, EITHER = "refuse", "pass", "either"

NUMBER = "@@@@@"
CANARY = f"GET /canary/{NUMBER} HTTP/1.1\r\nHost: probe.test\r\n\r\n"
# Behind the end of a chunked message, and within a chunk: whoever reads the other way finds it there.
BEHIND = "0\r\n\r\n" + CANARY
KEY = "dGhlIHNhbXBsZSBub25jZQ=="


@dataclass(frozen=True)
class Vector:
    """One request, or a bit more."""

    kind: str
    name: str
    right: str
    # Why: sections of RFC 9112, where no other is named.
    why: str
    text: str
    # What the backend gets as the body, if it gets the request.
    body: str | None = None
    # The hidden request is a request of its own for whoever reads the first one as the RFC says.
    is_honest: bool = False
    # It lacks its end: FIN follows, and not another request.
    is_cut: bool = False
    # Who answers it has to close (6.1).
    must_close: bool = False
    # It is another protocol's: whoever speaks that may answer so, and others may close without a word.
    is_foreign: bool = False
    # Whatever the answer, the target that the backend got.
    target: str | None = None
    # The only Host that the backend may get.
    host: str | None = None

    def data(self, number: int) -> bytes:
        return self.data_of(self.text, number)

    @staticmethod
    def data_of(text: str, number: int) -> bytes:
        return text.replace(NUMBER, f"{number:05}").encode("latin-1")

    @property
    def method(self) -> bytes:
        return self.text.split(" ")[0].encode("latin-1", "replace")


def chunk(text: str) -> str:
    return f"{len(text):x}\r\n{text}\r\n"


WITHIN = chunk(CANARY) + "0\r\n\r\n"


def post(*fields: str, body: str = "", method: str = "POST") -> str:
    return "\r\n".join([f"{method} /v/{NUMBER} HTTP/1.1", "Host: probe.test", *fields, "", body])


def get(*fields: str, behind: str = CANARY) -> str:
    return post(*fields, body=behind, method="GET")


def chunked(body: str) -> str:
    return post("Transfer-Encoding: chunked", body=body)


def length(text: str) -> str:
    return f"Content-Length: {len(text)}"


def te_and_cl() -> list[Vector]:
    kind, te = "CL and TE", "Transfer-Encoding: chunked"
    # "A server MAY reject a request that contains both ... or process such a request in accordance with the Transfer-Encoding alone. Regardless,
    # the server MUST close the connection after responding" (6.1).
    return [
        Vector(kind, "CL.TE", EITHER, "6.1", post(length(BEHIND), te, body=BEHIND), "", must_close=True),
        Vector(kind, "TE.CL", EITHER, "6.1", post("Content-Length: 4", te, body=WITHIN), CANARY, must_close=True),
        Vector(kind, "TE first, CL.TE", EITHER, "6.1", post(te, length(BEHIND), body=BEHIND), "", must_close=True),
        Vector(kind, "TE first, TE.CL", EITHER, "6.1", post(te, "Content-Length: 4", body=WITHIN), CANARY, must_close=True),
        Vector(kind, "CL.0 and TE", EITHER, "6.1", post("Content-Length: 0", te, body=WITHIN), CANARY, must_close=True),
        Vector(kind, "CL twice and TE", EITHER, "6.1", post("Content-Length: 3", te, "Content-Length: 4", body=WITHIN), CANARY, must_close=True),
        Vector(kind, "CL that is no number and TE", EITHER, "6.1", post(te, "Content-Length: x", body=WITHIN), CANARY, must_close=True),
        Vector(kind, "GET with both", EITHER, "6.1", post(te, length(BEHIND), body=BEHIND, method="GET"), "", must_close=True),
        Vector(kind, "TE of HTTP/1.0", EITHER, "6.1", chunked(BEHIND).replace("HTTP/1.1", "HTTP/1.0", 1), "", must_close=True),
        Vector(
            kind, "TE and CL of HTTP/1.0", EITHER, "6.1",
            post("Connection: keep-alive", te, length(BEHIND), body=BEHIND).replace("HTTP/1.1", "HTTP/1.0", 1),
        ),
        # "Transfer_Encoding" is another field, if one that some gateways take for this one.
        Vector(kind, "Transfer_Encoding and CL", EITHER, "5.1", post("Transfer_Encoding: chunked", length(BEHIND), body=BEHIND), BEHIND),
        Vector(kind, "TE and Content_Length", EITHER, "5.1", post(te, "Content_Length: 4", body=WITHIN), CANARY),
    ]  # fmt: skip


def codings() -> list[Vector]:
    kind = "TE"
    # Each of them is the field (or what one reader takes for it), and what is right where it stands alone.
    spellings = [
        ("xchunked", "Transfer-Encoding: xchunked", REFUSE, "6.3"),
        ("chunked-", "Transfer-Encoding: chunked-", REFUSE, "6.3"),
        ("chunk", "Transfer-Encoding: chunk", REFUSE, "6.3"),
        ("identity", "Transfer-Encoding: identity", REFUSE, "6.3"),
        ("empty", "Transfer-Encoding:", REFUSE, "6.3"),
        ("in quotes", 'Transfer-Encoding: "chunked"', REFUSE, "6.3"),
        ("with a parameter", "Transfer-Encoding: chunked;q=1", REFUSE, "7.1"),
        ("chunked, identity", "Transfer-Encoding: chunked, identity", REFUSE, "6.3"),
        ("chunked chunked", "Transfer-Encoding: chunked chunked", REFUSE, "6.3"),
        ("twice", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", REFUSE, "6.1"),
        ("chunked, chunked", "Transfer-Encoding: chunked, chunked", REFUSE, "6.1"),
        ("chunked and identity", "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", REFUSE, "6.3"),
        ("a space before the colon", "Transfer-Encoding : chunked", REFUSE, "5.1"),
        ("a tab before the colon", "Transfer-Encoding\t: chunked", REFUSE, "5.1"),
        ("a vertical tab", "Transfer-Encoding: \x0bchunked", REFUSE, "6.3"),
        ("a form feed behind", "Transfer-Encoding: chunked\x0c", REFUSE, "6.3"),
        ("a no-break space", "Transfer-Encoding: \xa0chunked", REFUSE, "6.3"),
        ("a NUL", "Transfer-Encoding: chunked\x00", REFUSE, "RFC 9110 5.5"),
        ("a NUL in the name", "Transfer\x00-Encoding: chunked", REFUSE, "5.1"),
        ("a BEL before the name", "\x07Transfer-Encoding: chunked", REFUSE, "5.1"),
        ("behind a bare CR", "X: y\rTransfer-Encoding: chunked", REFUSE, "2.2"),
    ]
    vectors = []
    for name, line, right, why in spellings:
        vectors += [
            Vector(kind, f"{name}, behind the end", right, why, post(line, length(BEHIND), body=BEHIND)),
            Vector(kind, f"{name}, in a chunk", right, why, post(line, "Content-Length: 4", body=WITHIN)),
        ]
    return vectors + [
        Vector(kind, "xchunked without CL", REFUSE, "6.3", post("Transfer-Encoding: xchunked", body=BEHIND)),
        Vector(kind, "gzip alone", REFUSE, "6.3", post("Transfer-Encoding: gzip", body=BEHIND)),
        # Case-insensitive, with optional whitespace around (7, 5.1).
        Vector(kind, "CHUNKED", PASS, "7", post("Transfer-Encoding: CHUNKED", body=WITHIN), CANARY),
        Vector(kind, "a tab for the space", PASS, "5.1", post("Transfer-Encoding:\tchunked", body=WITHIN), CANARY),
        Vector(kind, "spaces behind", PASS, "5.1", post("Transfer-Encoding: chunked \t", body=WITHIN), CANARY),
        Vector(kind, "transfer-encoding:chunked", PASS, "5.1", post("transfer-encoding:chunked", body=WITHIN), CANARY),
        # A coding that nobody need know (501), or that is removed.
        Vector(kind, "gzip, chunked", EITHER, "6.1", post("Transfer-Encoding: gzip, chunked", body=WITHIN), CANARY),
        Vector(kind, "identity, chunked", EITHER, "6.1", post("Transfer-Encoding: identity, chunked", body=WITHIN), CANARY),
        Vector(kind, "an empty element before", EITHER, "RFC 9110 5.6.1", post("Transfer-Encoding: , chunked", body=WITHIN), CANARY),
        Vector(kind, "an empty element behind", EITHER, "RFC 9110 5.6.1", post("Transfer-Encoding: chunked,", body=WITHIN), CANARY),
        # "MUST either reject ... or replace each received obs-fold with one or more SP octets" (5.2).
        Vector(kind, "on a folded line", EITHER, "5.2", post("Transfer-Encoding:\r\n chunked", body=WITHIN), CANARY),
        Vector(kind, "as the fold of another", EITHER, "5.2", post("X: y\r\n Transfer-Encoding: chunked", length(BEHIND), body=BEHIND), BEHIND),
        Vector(kind, "as the fold of another, by tab", EITHER, "5.2", post("X: y\r\n\tTransfer-Encoding: chunked", length(BEHIND), body=BEHIND), BEHIND),
        # "MAY recognize a single LF as a line terminator" (2.2).
        Vector(kind, "behind a bare LF", EITHER, "2.2", post("X: y\nTransfer-Encoding: chunked", length(BEHIND), body=BEHIND)),
        Vector(kind, "before a bare LF", EITHER, "2.2", post("Transfer-Encoding: chunked\nX: y", body=WITHIN), CANARY),
    ]  # fmt: skip


def lengths() -> list[Vector]:
    kind, five = "CL", "Content-Length: 5"
    # The canary is in the body for who reads so many bytes, and behind it for all others.
    long = len(CANARY)
    said = [
        ("+", f"+{long}"), ("-", f"-{long}"), ("0x", f"0x{long:x}"), ("hexadecimal", f"{long:x}h"), ("a fraction", f"{long}.0"),
        ("an exponent", f"{long}e0"), ("an underscore", "4_7"), ("two numbers", f"0 {long}"), ("a parameter", f"{long};q=1"),
        ("empty", ""), ("only a comma", ","), ("different in a list", f"0, {long}"), ("in quotes", f'"{long}"'),
        ("beyond 64 bits", str(2**64 + long)), ("2^64 - 1", str(2**64 - 1)), ("a thousand digits", "9" * 1000), ("a NUL", f"{long}\0"),
        ("a vertical tab", f"\x0b{long}"), ("full-width digits", "\xef\xbc\x95"), ("superscript", "\xb2"),
    ]  # fmt: skip
    return [
        *(Vector(kind, name, REFUSE, "6.3", post(f"Content-Length: {value}", body=CANARY)) for name, value in said),
        Vector(kind, "2^63", EITHER, "6.3", post(f"Content-Length: {2**63}", body=CANARY), is_cut=True),
        Vector(kind, "2^63 - 1", EITHER, "6.3", post(f"Content-Length: {2**63 - 1}", body=CANARY), is_cut=True),
        Vector(kind, "two that differ", REFUSE, "6.3", post("Content-Length: 0", length(CANARY), body=CANARY)),
        Vector(kind, "two that differ, long first", REFUSE, "6.3", post(length(CANARY), "Content-Length: 0", body=CANARY)),
        Vector(kind, "a space before the colon", REFUSE, "5.1", post(f"Content-Length : {long}", body=CANARY)),
        Vector(kind, "a tab before the colon", REFUSE, "5.1", post("Content-Length: 0", f"Content-Length\t: {long}", body=CANARY)),
        Vector(kind, "behind a bare CR", REFUSE, "2.2", post(f"X: y\rContent-Length: {long}", body=CANARY)),
        # "unless ... all values in the list are valid and identical, in which case the message MAY be processed with that single value" (6.3).
        Vector(kind, "twice the same", EITHER, "6.3", post(length(CANARY), length(CANARY), body=CANARY), CANARY),
        Vector(kind, "5, 5", EITHER, "6.3", post("Content-Length: 5, 5", body="hello" + CANARY), "hello", is_honest=True),
        Vector(kind, "on a folded line", EITHER, "5.2", post(f"Content-Length:\r\n {long}", body=CANARY), CANARY),
        Vector(kind, "folded in two", REFUSE, "6.3", post(f"Content-Length: 0\r\n {long}", body=CANARY)),
        Vector(kind, "behind a bare LF", EITHER, "2.2", post(f"X: y\nContent-Length: {long}", body=CANARY), CANARY),
        Vector(kind, "leading zeros", PASS, "RFC 9110 8.6", post(f"Content-Length: 000{long}", body=CANARY), CANARY),
        Vector(kind, "white space around", PASS, "5.1", post(f"Content-Length:\t {long} \t", body=CANARY), CANARY),
        Vector(kind, "a body, then an honest request", PASS, "9.3.2", post(five, body="hello" + CANARY), "hello", is_honest=True),
        Vector(kind, "GET with a body", PASS, "6", post(length(CANARY), body=CANARY, method="GET"), CANARY),
        Vector(kind, "HEAD with a body", PASS, "6", post(length(CANARY), body=CANARY, method="HEAD"), CANARY),
        Vector(kind, "OPTIONS with a body", PASS, "6", post(length(CANARY), body=CANARY, method="OPTIONS"), CANARY),
        Vector(kind, "POST without a length", PASS, "6.3", post(body=CANARY), "", is_honest=True),
        Vector(kind, "cut short", REFUSE, "8", post("Content-Length: 500", body=CANARY), is_cut=True),
    ]  # fmt: skip


def lines() -> list[Vector]:
    kind = "lines"
    good = get()
    hidden = CANARY.removesuffix("\r\n\r\n")
    return [
        Vector(kind, "LF throughout", EITHER, "2.2", get(behind="").replace("\r\n", "\n") + CANARY, "", is_honest=True),
        Vector(kind, "LF at the request line", EITHER, "2.2", good.replace("\r\n", "\n", 1), "", is_honest=True),
        Vector(kind, "LF LF at the end", EITHER, "2.2", get(behind="").removesuffix("\r\n\r\n") + "\n\n" + CANARY, "", is_honest=True),
        Vector(kind, "CR LF LF at the end", EITHER, "2.2", get(behind="").removesuffix("\r\n") + "\n" + CANARY, "", is_honest=True),
        Vector(kind, "LF CR LF at the end", EITHER, "2.2", get(behind="").removesuffix("\r\n\r\n") + "\n\r\n" + CANARY, "", is_honest=True),
        Vector(kind, "CR CR LF", REFUSE, "2.2", get("X: y\r", behind=CANARY)),
        Vector(kind, "CR CR for the end", REFUSE, "2.2", get("X: y\r\r" + hidden)),
        Vector(kind, "a bare CR in a value", REFUSE, "2.2", get("X: y\rz: a")),
        Vector(kind, "a bare CR before the end", REFUSE, "2.2", get("X: y", "\r" + hidden)),
        Vector(kind, "a bare CR at the request line", REFUSE, "2.2", good.replace("\r\n", "\r", 1)),
        # "a recipient of CR, LF, or NUL within a field value MUST either reject the message or replace each of those characters with SP".
        Vector(kind, "a NUL in a value", EITHER, "RFC 9110 5.5", get("X: y\0z"), "", is_honest=True),
        Vector(kind, "a NUL in a name", REFUSE, "5.1", get("X\0: y")),
        Vector(kind, "a control character in a value", EITHER, "RFC 9110 5.5", get("X: y\x01"), "", is_honest=True),
        Vector(kind, "DEL in a value", EITHER, "RFC 9110 5.5", get("X: y\x7f"), "", is_honest=True),
        Vector(kind, "DEL in a name", REFUSE, "5.1", get("X\x7f: y")),
        Vector(kind, "a high byte in a name", REFUSE, "5.1", get("X\xff: y")),
        Vector(kind, "high bytes in a value", PASS, "RFC 9110 5.5", get("X: gr\xfc\xdfe \xff"), "", is_honest=True),
        Vector(kind, "a folded line", EITHER, "5.2", get("X: y", " z"), "", is_honest=True),
        Vector(kind, "a folded request", EITHER, "5.2", get("X: y", f" {hidden}"), "", is_honest=True),
        Vector(kind, "a line of spaces only", EITHER, "5.2", get("X: y", "  ", hidden), "", is_honest=True),
        # "MUST either reject the message as invalid or consume each whitespace-preceded line without further processing" (2.2).
        Vector(kind, "the first line is folded", EITHER, "2.2", good.replace("Host:", " Host:", 1)),
        Vector(kind, "a fold before all fields", EITHER, "2.2", good.replace("Host:", " Content-Length: 5\r\nHost:", 1), "", is_honest=True),
        Vector(kind, "a name with a space", REFUSE, "5.1", get("X Y: z")),
        Vector(kind, "a name with parentheses", REFUSE, "5.1", get("X(Y): z")),
        Vector(kind, "no name", REFUSE, "5.1", get(": z")),
        Vector(kind, "no colon", REFUSE, "5", get("X")),
        Vector(kind, "a request for a field", REFUSE, "5", get(hidden)),
        Vector(kind, "a colon in a value", PASS, "5", get("X::y: z"), "", is_honest=True),
        Vector(kind, "an empty value", PASS, "5", get("X:"), "", is_honest=True),
        # "SHOULD ignore at least one empty line (CRLF) received prior to the request-line" (2.2).
        Vector(kind, "an empty line before", PASS, "2.2", "\r\n" + good, "", is_honest=True),
        Vector(kind, "a bare LF before", EITHER, "2.2", "\n" + good, "", is_honest=True),
        Vector(kind, "a space before", REFUSE, "3", " " + good),
        Vector(kind, "NUL before", REFUSE, "3", "\0" + good),
        Vector(kind, "101 fields", EITHER, "RFC 9110 5.4", get(*(f"X-{index}: y" for index in range(101))), "", is_honest=True),
        Vector(kind, "a field of 40 KB", EITHER, "RFC 9110 5.4", get("X: " + "y" * 40_000), "", is_honest=True),
    ]  # fmt: skip


def chunks() -> list[Vector]:
    kind = "chunks"
    five, end = "5\r\nhello\r\n", "0\r\n\r\n"
    # The size as it stands, of a chunk with the canary in it; who reads it as 0, or not at all, finds the canary.
    size = f"{len(CANARY):x}"
    sizes = [
        ("+", f"+{size}"), ("-", f"-{size}"), ("0x", f"0x{size}"), ("a space before", f" {size}"), ("a tab before", f"\t{size}"),
        ("no digit", f"{size}g"), ("an underscore", "2_f"), ("empty", ""), ("beyond 64 bits", f"1000000000000000{size:0>4}"), 
        ("a NUL", f"{size}\0"), ("a comma", f"{size},5"), ("decimal point", f"{size}.0"), ("high byte", f"{size}\xa0"),
    ]  # fmt: skip
    extended = f"{size};a=b\r\n{CANARY}\r\n{end}"
    return [
        *(Vector(kind, f"size: {name}", REFUSE, "7.1", chunked(f"{value}\r\n{CANARY}\r\n{end}")) for name, value in sizes),
        # So much may come; nobody has to hold it.
        Vector(kind, "size: 2^63", EITHER, "7.1", chunked(f"8{'0' * 15}\r\n{CANARY}"), is_cut=True),
        Vector(kind, "size: 2^64 - 1", EITHER, "7.1", chunked(f"{'F' * 16}\r\n{CANARY}"), is_cut=True),
        # A space behind the size is nothing by the grammar, and was sent by old servers.
        Vector(kind, "size: a space behind", EITHER, "7.1", chunked(f"{size} \r\n{CANARY}\r\n{end}"), CANARY),
        Vector(kind, "size: leading zeros", PASS, "7.1", chunked(f"0000{size}\r\n{CANARY}\r\n{end}"), CANARY),
        Vector(kind, "size: upper case", PASS, "7.1", chunked(f"{size.upper()}\r\n{CANARY}\r\n{end}"), CANARY),
        Vector(kind, "size: LF behind", EITHER, "2.2", chunked(f"{size}\n{CANARY}\r\n{end}"), CANARY),
        Vector(kind, "size: CR behind", REFUSE, "7.1", chunked(f"{size}\r{CANARY}\r\n{end}")),
        Vector(kind, "size: CR CR LF behind", REFUSE, "7.1", chunked(f"{size}\r\r\n{CANARY}\r\n{end}")),
        Vector(kind, "a chunk that is longer than it says", REFUSE, "7.1", chunked(f"5\r\nhello{CANARY}\r\n{end}")),
        Vector(kind, "a chunk without CR LF", REFUSE, "7.1", chunked(f"5\r\nhello{size}\r\n{CANARY}\r\n{end}")),
        Vector(kind, "two other bytes for CR LF", REFUSE, "7.1", chunked(f"5\r\nhelloXX{size}\r\n{CANARY}\r\n{end}")),
        Vector(kind, "LF behind a chunk", EITHER, "2.2", chunked(f"{size}\r\n{CANARY}\n{end}"), CANARY),
        Vector(kind, "the last CR LF is missing", REFUSE, "7.1", chunked(f"{five}0\r\n{CANARY}")),
        Vector(kind, "LF LF for the end", EITHER, "2.2", chunked(f"{five}0\n\n{CANARY}"), "hello", is_honest=True),
        Vector(kind, "000 for the end", PASS, "7.1", chunked(f"{five}000\r\n\r\n{CANARY}"), "hello", is_honest=True),
        Vector(kind, "an honest request behind", PASS, "9.3.2", chunked(f"{five}{end}{CANARY}"), "hello", is_honest=True),
        Vector(kind, "cut short", REFUSE, "8", chunked("500\r\n" + CANARY), is_cut=True),
        Vector(kind, "without an end", REFUSE, "8", chunked(chunk(CANARY)), is_cut=True),
        # "A recipient MUST ignore unrecognized chunk extensions", and "ought to limit the total length" (7.1.1).
        Vector(kind, "extension", PASS, "7.1.1", chunked(extended), CANARY),
        Vector(kind, "extension in quotes", PASS, "7.1.1", chunked(f'{size};a="b;c"\r\n{CANARY}\r\n{end}'), CANARY),
        Vector(kind, "extension at the end", PASS, "7.1.1", chunked(f"{five}0;a=b\r\n\r\n{CANARY}"), "hello", is_honest=True),
        Vector(kind, "extension with spaces around", EITHER, "7.1.1", chunked(f"{size} ; a = b\r\n{CANARY}\r\n{end}"), CANARY),
        Vector(kind, "extension that is empty", EITHER, "7.1.1", chunked(f"{size};\r\n{CANARY}\r\n{end}"), CANARY),
        Vector(kind, "extension with an LF", REFUSE, "7.1.1", chunked(f"5;a\nhello\r\n{size};a=b\r\n{CANARY}\r\n{end}")),
        Vector(kind, "extension of an LF, at the end", REFUSE, "7.1.1", chunked(f"0;\nx\r\n\r\n{CANARY}")),
        Vector(kind, "extension with a CR", REFUSE, "7.1.1", chunked(f"{size};a\rb\r\n{CANARY}\r\n{end}")),
        Vector(kind, "extension with a NUL", EITHER, "7.1.1", chunked(f"{size};a\0\r\n{CANARY}\r\n{end}"), CANARY),
        Vector(kind, "extension with an LF in quotes", REFUSE, "7.1.1", chunked(f'{size};a="\n"\r\n{CANARY}\r\n{end}')),
        Vector(kind, "extension of 20 KB", EITHER, "7.1.1", chunked(f"{size};{'a' * 20_000}\r\n{CANARY}\r\n{end}"), CANARY),
        Vector(kind, "extensions of 100 KB in all", EITHER, "7.1.1", chunked("1;" + "a" * 200 + "\r\nx\r\n") + "", is_cut=True),
        # Trailers "MUST NOT be merged" where they are about framing or routing (RFC 9110 6.5.1).
        *(
            Vector(kind, f"trailer {line.split(':')[0]}", EITHER, "RFC 9110 6.5.1", chunked(f"{five}0\r\n{line}\r\n\r\n{CANARY}"), "hello", is_honest=True)
            for line in (
                length(CANARY), "Transfer-Encoding: chunked", "Host: elsewhere.test", "Connection: upgrade", "X-Forwarded-For: 192.0.2.1",
            )
        ),
        Vector(kind, "trailer", PASS, "7.1.2", chunked(f"{five}0\r\nX-Sum: 1\r\n\r\n{CANARY}"), "hello", is_honest=True),
        Vector(kind, "trailer without a colon", REFUSE, "7.1.2", chunked(f"{five}0\r\nX\r\n\r\n{CANARY}")),
        Vector(kind, "trailer that is folded", EITHER, "5.2", chunked(f"{five}0\r\nX: y\r\n z\r\n\r\n{CANARY}"), "hello", is_honest=True),
        Vector(kind, "trailer behind LF", EITHER, "2.2", chunked(f"{five}0\r\nX: y\n\r\n{CANARY}"), "hello", is_honest=True),
        Vector(kind, "trailer with a bare CR", REFUSE, "2.2", chunked(f"{five}0\r\nX: y\rz: a\r\n\r\n{CANARY}")),
        Vector(kind, "trailer of 40 KB", EITHER, "7.1.2", chunked(f"{five}0\r\nX: {'y' * 40_000}\r\n\r\n{CANARY}"), "hello", is_honest=True),
    ]  # fmt: skip


def targets() -> list[Vector]:
    kind, good = "target, Host", get()

    def line(text: str, host: str = "Host: probe.test", behind: str = CANARY) -> str:
        return f"{text}\r\n{host}\r\n\r\n{behind}" if host else f"{text}\r\n\r\n{behind}"

    v = f"/v/{NUMBER}"
    # Paths that a backend may take for one that another backend is for.
    detours = [
        ("/../", f"/v/../canary/{NUMBER}"), ("%2e%2e", f"/v/%2e%2e/canary/{NUMBER}"), ("two slashes", f"//canary/{NUMBER}"),
        ("an encoded slash", f"/canary%2f{NUMBER}"), ("an encoded letter", f"/%63anary/{NUMBER}"), ("a backslash", f"\\canary\\{NUMBER}"),
        ("parameters", f"/canary;a=b/{NUMBER}"), ("/./", f"/./canary/{NUMBER}"),
    ]  # fmt: skip
    return [
        # "MUST respond with a 400 ... that lacks a Host header field and ... more than one ... or ... an invalid field value" (3.2).
        Vector(kind, "two Hosts that differ", REFUSE, "3.2", get("Host: elsewhere.test")),
        Vector(kind, "the same Host twice", REFUSE, "3.2", get("Host: probe.test")),
        Vector(kind, "no Host", REFUSE, "3.2", line(f"GET {v} HTTP/1.1", "")),
        Vector(kind, "Hosts in a list", REFUSE, "3.2", line(f"GET {v} HTTP/1.1", "Host: probe.test, elsewhere.test")),
        Vector(kind, "a Host with a space", REFUSE, "3.2", line(f"GET {v} HTTP/1.1", "Host: probe.test elsewhere.test")),
        Vector(kind, "a Host with a path", REFUSE, "3.2", line(f"GET {v} HTTP/1.1", "Host: probe.test/elsewhere")),
        Vector(kind, "a Host with a name of a user", REFUSE, "3.2", line(f"GET {v} HTTP/1.1", "Host: user@probe.test")),
        Vector(kind, "a Host with a port that is none", REFUSE, "3.2", line(f"GET {v} HTTP/1.1", "Host: probe.test:x")),
        Vector(kind, "a space before Host's colon", REFUSE, "5.1", line(f"GET {v} HTTP/1.1", "Host : probe.test")),
        Vector(kind, "Host, and one behind a bare CR", REFUSE, "2.2", get("X: y\rHost: elsewhere.test")),
        Vector(kind, "an empty Host", EITHER, "3.2", line(f"GET {v} HTTP/1.1", "Host:"), "", is_honest=True),
        Vector(kind, "no Host in HTTP/1.0", EITHER, "3.2", line(f"GET {v} HTTP/1.0", "", ""), ""),
        # "MUST ignore the received Host header field (if any) and instead replace it with the host information of the request-target" (3.2.2).
        Vector(kind, "absolute form", PASS, "3.2.2", line(f"GET http://probe.test{v} HTTP/1.1"), "", True, target=v, host="probe.test"),
        Vector(kind, "absolute form, another Host", PASS, "3.2.2", line(f"GET http://elsewhere.test{v} HTTP/1.1"), "", True, target=v, host="elsewhere.test"),
        Vector(kind, "absolute form, two Hosts", REFUSE, "3.2", line(f"GET http://elsewhere.test{v} HTTP/1.1", "Host: a\r\nHost: b")),
        Vector(kind, "absolute form with a user", REFUSE, "RFC 9110 4.2.4", line(f"GET http://a:b@probe.test{v} HTTP/1.1")),
        Vector(kind, "absolute form without a host", REFUSE, "RFC 9110 4.2.1", line(f"GET http://{v} HTTP/1.1")),
        Vector(kind, "absolute form of ftp", EITHER, "3.2.2", line(f"GET ftp://probe.test{v} HTTP/1.1"), "", True, target=v, host="probe.test"),
        Vector(kind, "authority form of GET", REFUSE, "3.2.3", line("GET probe.test:80 HTTP/1.1")),
        Vector(kind, "CONNECT", REFUSE, "RFC 9110 9.3.6", line("CONNECT probe.test:80 HTTP/1.1", "Host: probe.test:80")),
        Vector(kind, "CONNECT with a path", REFUSE, "RFC 9110 9.3.6", line(f"CONNECT {v} HTTP/1.1")),
        Vector(kind, "asterisk form of OPTIONS", EITHER, "3.2.4", line("OPTIONS * HTTP/1.1", f"Host: probe.test\r\nX-Number: {NUMBER}"), "", is_honest=True),
        Vector(kind, "asterisk form of GET", REFUSE, "3.2.4", line("GET * HTTP/1.1")),
        Vector(kind, "no slash at the beginning", REFUSE, "3.2", line(f"GET v/{NUMBER} HTTP/1.1")),
        Vector(kind, "a query alone", REFUSE, "3.2", line(f"GET ?{v} HTTP/1.1")),
        # "a recipient SHOULD respond with either a 400 ... or a 301 ... with the request-target properly encoded" (3.2).
        Vector(kind, "a space in the target", REFUSE, "3.2", line(f"GET {v} /canary/{NUMBER} HTTP/1.1")),
        Vector(kind, "a version in the target", REFUSE, "3.2", line(f"GET {v} HTTP/1.1 HTTP/1.1")),
        Vector(kind, "a tab for a space", EITHER, "3", line(f"GET\t{v}\tHTTP/1.1"), "", is_honest=True),
        Vector(kind, "two spaces", EITHER, "3", line(f"GET  {v}  HTTP/1.1"), "", is_honest=True),
        Vector(kind, "a space behind", EITHER, "3", line(f"GET {v} HTTP/1.1 "), "", is_honest=True),
        Vector(kind, "a fragment", EITHER, "3.2", line(f"GET {v}#/canary/ HTTP/1.1"), "", is_honest=True),
        Vector(kind, "a NUL in the target", REFUSE, "3.2", line(f"GET {v}\0 HTTP/1.1")),
        Vector(kind, "a control character in the target", REFUSE, "3.2", line(f"GET {v}\x01 HTTP/1.1")),
        Vector(kind, "high bytes in the target", EITHER, "3.2", line(f"GET {v}\xff HTTP/1.1"), "", is_honest=True),
        Vector(kind, "encoded CR LF in the target", EITHER, "3.2", line(f"GET {v}%0d%0aX:%20y HTTP/1.1"), "", is_honest=True),
        Vector(kind, "encoded CR LF in the query", PASS, "3.2", line(f"GET {v}?a=%0d%0aX:%20y HTTP/1.1"), "", True, target=f"{v}?a=%0d%0aX:%20y"),
        Vector(kind, "a target of 40 KB", EITHER, "3", line(f"GET {v}?{'a' * 40_000} HTTP/1.1"), "", is_honest=True),
        *(Vector("detours", f"by {name}", EITHER, "RFC 3986 6.2.2", good.replace(v, target), "", is_honest=True) for name, target in detours),
    ]  # fmt: skip


def versions() -> list[Vector]:
    kind = "method, version"

    def line(text: str, *fields: str, behind: str = CANARY) -> str:
        return "\r\n".join([text, "Host: probe.test", *fields, "", behind])

    v = f"/v/{NUMBER}"
    return [
        # "The method token is case-sensitive" (RFC 9110 9.1): another method, which a backend may know.
        Vector(kind, "get", EITHER, "RFC 9110 9.1", line(f"get {v} HTTP/1.1"), "", is_honest=True),
        Vector(kind, "a method nobody knows", EITHER, "RFC 9110 9.1", line(f"PROBE {v} HTTP/1.1"), "", is_honest=True),
        Vector(kind, "a method nobody knows, with a body", EITHER, "RFC 9110 9.1", post(length(CANARY), body=CANARY, method="PROBE"), CANARY),
        Vector(kind, "no method", REFUSE, "3.1", line(f" {v} HTTP/1.1")),
        Vector(kind, "a method with a colon", REFUSE, "3.1", line(f"GET: {v} HTTP/1.1")),
        Vector(kind, "a method with a NUL", REFUSE, "3.1", line(f"GE\0T {v} HTTP/1.1")),
        Vector(kind, "a method of 40 KB", EITHER, "3.1", line(f"{'M' * 40_000} {v} HTTP/1.1"), "", is_honest=True),
        Vector(kind, "TRACE with a body", EITHER, "RFC 9110 9.3.8", post(length(CANARY), body=CANARY, method="TRACE"), CANARY),
        # "SHOULD process the message as if it was in the highest minor version within that major version" (RFC 9110 2.5).
        Vector(kind, "HTTP/1.2", EITHER, "RFC 9110 2.5", line(f"GET {v} HTTP/1.2"), "", is_honest=True),
        Vector(kind, "HTTP/1.0, kept alive", PASS, "9.3", line(f"POST {v} HTTP/1.0", "Connection: keep-alive", length(CANARY)), CANARY),
        Vector(kind, "HTTP/0.9", REFUSE, "3", f"GET {v}\r\n\r\n{CANARY}", is_foreign=True),
        Vector(kind, "HTTP/0.9 with a version", REFUSE, "2.3", line(f"GET {v} HTTP/0.9")),
        Vector(kind, "HTTP/2.0", REFUSE, "2.3", line(f"GET {v} HTTP/2.0")),
        Vector(kind, "HTTP/3.0", REFUSE, "2.3", line(f"GET {v} HTTP/3.0")),
        Vector(kind, "HTTP/1.10", REFUSE, "2.3", line(f"GET {v} HTTP/1.10")),
        Vector(kind, "HTTP/01.1", REFUSE, "2.3", line(f"GET {v} HTTP/01.1")),
        Vector(kind, "HTTP/1", REFUSE, "2.3", line(f"GET {v} HTTP/1")),
        Vector(kind, "http/1.1", REFUSE, "2.3", line(f"GET {v} http/1.1")),
        Vector(kind, "HTTP/1,1", REFUSE, "2.3", line(f"GET {v} HTTP/1,1")),
        Vector(kind, "XHTTP/1.1", REFUSE, "2.3", line(f"GET {v} XHTTP/1.1")),
        Vector(kind, "HTTPS/1.1", REFUSE, "2.3", line(f"GET {v} HTTPS/1.1")),
        # What follows it is no frame, whoever speaks HTTP/2 here.
        Vector(kind, "HTTP/2's preface", REFUSE, "RFC 9113 3.4", f"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n{CANARY}", is_foreign=True),
        Vector(kind, "TLS", REFUSE, "3", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n" + CANARY),
        Vector(kind, "a response", REFUSE, "3", f"HTTP/1.1 200 OK\r\nHost: probe.test\r\nContent-Length: 0\r\n\r\n{CANARY}"),
    ]  # fmt: skip


def upgrades() -> list[Vector]:
    kind = "upgrades"
    ws = ["Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Key: {KEY}", "Sec-WebSocket-Version: 13"]
    settings = "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"

    def handshake(*more: str, behind: str = CANARY, method: str = "GET") -> str:
        return post(*ws, *more, body=behind, method=method)

    def other(upgrade: str, connection: str = "Connection: Upgrade", *more: str, behind: str = CANARY) -> str:
        return get(upgrade, connection, *more, behind=behind)

    # The backend answers 200 to all of these. "A server MAY ignore a received Upgrade header field" (RFC 9110 7.8).
    may = "RFC 9110 7.8"
    return [
        # CVE-2026-58055: the body of a handshake becomes the beginning of a tunnel.
        Vector(kind, "websocket with a counted body", REFUSE, "RFC 6455 4.1", handshake(length(CANARY))),
        Vector(kind, "websocket with a chunked body", REFUSE, "RFC 6455 4.1", handshake("Transfer-Encoding: chunked", behind=WITHIN)),
        Vector(kind, "websocket with CL and TE", REFUSE, "6.1", handshake(length(BEHIND), "Transfer-Encoding: chunked", behind=BEHIND)),
        Vector(kind, "websocket with CL 0", EITHER, "RFC 6455 4.1", handshake("Content-Length: 0"), "", is_honest=True),
        Vector(kind, "websocket by POST with a body", REFUSE, "RFC 6455 4.1", handshake(length(CANARY), method="POST")),
        Vector(kind, "websocket that is refused", PASS, "RFC 6455 4.1", handshake(), "", is_honest=True),
        Vector(kind, "websocket in capitals", PASS, "RFC 6455 4.2.1", handshake().replace("websocket", "WebSocket", 1), "", is_honest=True),
        Vector(kind, "websocket without Connection", EITHER, may, handshake().replace("Connection: Upgrade\r\n", ""), "", is_honest=True),
        Vector(kind, "websocket with Expect", EITHER, "RFC 9110 10.1.1", handshake("Expect: 100-continue"), "", is_honest=True),
        Vector(kind, "websocket and h2c", EITHER, may, other("Upgrade: websocket, h2c", "Connection: Upgrade", *ws[2:]), "", is_honest=True),
        Vector(kind, "h2c, websocket", EITHER, may, other("Upgrade: h2c, websocket", "Connection: Upgrade", *ws[2:]), "", is_honest=True),
        Vector(kind, "h2c and websocket in two lines", EITHER, may, handshake("Upgrade: h2c"), "", is_honest=True),
        Vector(kind, "h2c", EITHER, may, other("Upgrade: h2c"), "", is_honest=True),
        Vector(kind, "h2c with its settings", EITHER, may, other("Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", settings), "", is_honest=True),
        Vector(kind, "h2c with settings that are not listed", EITHER, may, other("Upgrade: h2c", "Connection: Upgrade", settings), "", is_honest=True),
        Vector(kind, "h2c that is not listed", EITHER, may, other("Upgrade: h2c", "Connection: keep-alive", settings), "", is_honest=True),
        Vector(kind, "H2C", EITHER, may, other("Upgrade: H2C", "Connection: upgrade, http2-settings", settings), "", is_honest=True),
        Vector(kind, "h2c with a body", EITHER, may, post("Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", settings, length(CANARY), body=CANARY), CANARY),
        Vector(kind, "h2", EITHER, may, other("Upgrade: h2"), "", is_honest=True),
        Vector(kind, "settings alone", EITHER, "RFC 7540 3.2.1", get(settings), "", is_honest=True),
        Vector(kind, "TLS/1.0", EITHER, may, other("Upgrade: TLS/1.0"), "", is_honest=True),
        Vector(kind, "connect-udp", EITHER, may, other("Upgrade: connect-udp"), "", is_honest=True),
        Vector(kind, "an empty Upgrade", EITHER, may, other("Upgrade:"), "", is_honest=True),
        Vector(kind, "Connection: Upgrade alone", EITHER, may, get("Connection: Upgrade"), "", is_honest=True),
    ]  # fmt: skip


def hops() -> list[Vector]:
    kind, host = "hop-by-hop", "probe.test"

    def listed(text: str, *more: str) -> str:
        return post(f"Connection: {text}", *more, length(CANARY), body=CANARY)

    # "MUST ... remove the Connection header field and any fields it lists" (RFC 9110 7.6.1); what frames and routes this message stays, or it is refused.
    why = "RFC 9110 7.6.1"
    return [
        Vector(kind, "X-Forwarded-For, Upgrade", PASS, why, listed("X-Forwarded-For, Upgrade", "X-Forwarded-For: 192.0.2.1"), CANARY),
        Vector(kind, "X-Forwarded-For", PASS, why, listed("close, X-Forwarded-For"), CANARY),
        Vector(kind, "X-Forwarded-Host, X-Real-IP", PASS, why, listed("X-Forwarded-Host, X-Real-IP, X-Forwarded-Proto"), CANARY),
        Vector(kind, "Content-Length", EITHER, why, listed("Content-Length"), CANARY),
        Vector(kind, "content-length, in a list", EITHER, why, listed("keep-alive, content-length"), CANARY),
        Vector(kind, "Transfer-Encoding", EITHER, why, post("Connection: Transfer-Encoding", "Transfer-Encoding: chunked", body=WITHIN), CANARY),
        Vector(kind, "Host", EITHER, why, listed("Host"), CANARY, host=host),
        Vector(kind, "Cookie", PASS, why, listed("Cookie", "Cookie: a=b"), CANARY),
        Vector(kind, "Authorization", PASS, why, listed("Authorization", "Authorization: Basic eDp5"), CANARY),
        Vector(kind, "Connection itself", EITHER, why, listed("Connection"), CANARY),
        Vector(kind, "no token", EITHER, why, listed("\x00"), CANARY),
        Vector(kind, "no token, visible", EITHER, why, listed("a b, {}, ("), CANARY),
        Vector(kind, "only commas", PASS, why, listed(", ,,"), CANARY),
        Vector(kind, "a hundred", EITHER, why, listed(", ".join(f"X-{n}" for n in range(100))), CANARY),
        Vector(kind, "in two lines", PASS, why, listed("keep-alive", "Connection: X-Secret", "X-Secret: 1"), CANARY),
        Vector(kind, "Keep-Alive", PASS, "App. C.2.2", listed("Keep-Alive", "Keep-Alive: timeout=5"), CANARY),
        Vector(kind, "Proxy-Connection", PASS, "App. C.2.2", get("Proxy-Connection: keep-alive"), "", is_honest=True),
        Vector(kind, "TE: trailers", PASS, "RFC 9110 10.1.4", listed("TE", "TE: trailers, deflate"), CANARY),
        Vector(kind, "TE that is not listed", PASS, "RFC 9110 10.1.4", get("TE: chunked"), "", is_honest=True),
        Vector(kind, "Trailer: Content-Length", EITHER, "RFC 9110 6.6.2", get("Trailer: Content-Length, Host"), "", is_honest=True),
    ]  # fmt: skip


def expectations() -> list[Vector]:
    kind, why = "Expect", "RFC 9110 10.1.1"
    early = post("Expect: 100-continue", length(CANARY), body=CANARY).replace("/v/", "/early/", 1)
    return [
        Vector(kind, "100-continue", PASS, why, post("Expect: 100-continue", length(CANARY), body=CANARY), CANARY),
        Vector(kind, "100-Continue", PASS, why, post("Expect: 100-Continue", length(CANARY), body=CANARY), CANARY),
        Vector(kind, "100-continue, chunked", PASS, why, post("Expect: 100-continue", "Transfer-Encoding: chunked", body=WITHIN), CANARY),
        Vector(kind, "100-continue without a body", PASS, why, get("Expect: 100-continue"), "", is_honest=True),
        Vector(kind, "100-continue with CL 0", PASS, why, post("Expect: 100-continue", "Content-Length: 0", body=CANARY), "", is_honest=True),
        Vector(kind, "100-continue of HTTP/1.0", EITHER, why, post("Expect: 100-continue", length(CANARY), body=CANARY).replace("HTTP/1.1", "HTTP/1.0", 1), CANARY),
        Vector(kind, "another", EITHER, why, post("Expect: 200-maybe", length(CANARY), body=CANARY), CANARY),
        Vector(kind, "two in a list", EITHER, why, post("Expect: 100-continue, 100-continue", length(CANARY), body=CANARY), CANARY),
        Vector(kind, "two lines", EITHER, why, post("Expect: 100-continue", "Expect: x", length(CANARY), body=CANARY), CANARY),
        Vector(kind, "a bare CR behind", REFUSE, "2.2", post("Expect: 100-continue\ry", length(CANARY), body=CANARY)),
        Vector(kind, "folded", EITHER, "5.2", post("Expect:\r\n 100-continue", length(CANARY), body=CANARY), CANARY),
        # The backend answers 417 at once, and reads the body all the same: who sends a body after that answer sends a body, and no request.
        Vector(kind, "answered before the body", PASS, why, early, CANARY),
        Vector(kind, "answered before the body, chunked", PASS, why, post("Expect: 100-continue", "Transfer-Encoding: chunked", body=WITHIN).replace("/v/", "/early/", 1), CANARY),
        Vector(kind, "answered before the body, no Expect", PASS, "9.6", early.replace("Expect: 100-continue\r\n", ""), CANARY),
    ]  # fmt: skip


VECTORS: list[Vector] = [
    *te_and_cl(), *codings(), *lengths(), *lines(), *chunks(), *targets(), *versions(), *upgrades(), *hops(), *expectations(),
]  # fmt: skip
