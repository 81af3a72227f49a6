using System.Globalization;
using System.Text;
using System.Text.Json.Nodes;
using Vmm.Core.Wire;

namespace Vmm.Migration.Qmp;

/// <summary>
/// One value or one parse error from a QMP byte stream. <see cref="Error"/> is null for a value; <see cref="Value"/> is null for an error and for
/// JSON null.
/// </summary>
internal readonly record struct QmpInput(JsonNode? Value, string? Error);

/// <summary>
/// Splits a byte stream into JSON values (qmp 1); a read may bring several values or a part of one. Accepts QEMU's single-quoted strings, refuses
/// duplicate keys, and resynchronises at control bytes. An exceeded limit is a parse error and does not end the connection. Not thread-safe (QEMU:
/// JSONMessageParser).
/// </summary>
internal sealed class QmpJsonReader
{
    internal const int MaxTokenBytes = WireLimits.QmpRequestBytes;

    private enum State { Start, Recovery, String, Escape, Sign, Zero, Digits, Point, Fraction, ExponentMark, ExponentSign, Exponent, Keyword }

    private readonly Queue<QmpInput> _found = new();
    private readonly QmpJsonTree _tree = new();
    private readonly int _maxTokenBytes;
    private byte[] _token = new byte[256];
    private int _tokenBytes, _objectBytes, _tokens, _braces, _brackets, _line = 1, _column, _tokenLine, _tokenColumn;
    private byte _quote;
    private State _state;

    internal QmpJsonReader(int maxTokenBytes = MaxTokenBytes) => _maxTokenBytes = maxTokenBytes;

    /// <summary>Takes the next value or error, in the order of the stream.</summary>
    internal bool TryTake(out QmpInput input) => _found.TryDequeue(out input);

    /// <summary>Adds bytes; <see cref="TryTake"/> then returns the values that they complete.</summary>
    internal void Feed(ReadOnlySpan<byte> bytes)
    {
        foreach (byte b in bytes)
        {
            _column++;
            // A byte that ends a number or a keyword is no part of it, so the start state handles that byte again.
            while (!Step(b)) { }
            if (b == '\n') (_line, _column) = (_line + 1, 0);
            if (_tokenBytes > _maxTokenBytes) Fail("JSON token size limit exceeded");
        }
    }

    private bool Step(byte b)
    {
        switch (_state)
        {
            case State.Start: return Begin(b);
            case State.Recovery:
                if (b is (byte)'\t' or >= 0x20 and < 0xFE && !IsStructural(b)) return true;
                _state = State.Start;
                return false;
            case State.Escape: return b is >= 0x20 and < 0xFE ? Keep(b, State.String) : Stray(b);
            case State.String:
                if (b is < 0x20 or >= 0xFE) return Stray(b);
                if (b != _quote) return Keep(b, b == '\\' ? State.Escape : State.String);
                Keep(b, State.Start);
                return EndToken(QmpToken.String);
            case State.Keyword: return b is >= (byte)'a' and <= (byte)'z' ? Keep(b, State.Keyword) : !EndToken(QmpToken.Keyword);
            default: return Number(b);
        }
    }

    private bool Begin(byte b)
    {
        switch (b)
        {
            case (byte)' ' or (byte)'\t' or (byte)'\r' or (byte)'\n': return true;
            case (byte)'"' or (byte)'\'': _quote = b; return Keep(b, State.String);
            case (byte)'-': return Keep(b, State.Sign);
            case (byte)'0': return Keep(b, State.Zero);
            case >= (byte)'1' and <= (byte)'9': return Keep(b, State.Digits);
            case >= (byte)'a' and <= (byte)'z': return Keep(b, State.Keyword);
            default:
                if (!IsStructural(b)) return Stray(b);
                Keep(b, State.Start);
                return EndToken((QmpToken)b);
        }
    }

    private bool Number(byte b)
    {
        bool digit = b is >= (byte)'0' and <= (byte)'9', mark = b is (byte)'e' or (byte)'E';
        switch (_state)
        {
            case State.Sign when digit: return Keep(b, b == '0' ? State.Zero : State.Digits);
            case State.Zero or State.Digits when b == '.': return Keep(b, State.Point);
            case State.Zero when digit: return Stray(b);
            case State.Digits or State.Fraction when digit: return Keep(b, _state);
            case State.Digits or State.Fraction when mark: return Keep(b, State.ExponentMark);
            case State.Point when digit: return Keep(b, State.Fraction);
            case State.ExponentMark when b is (byte)'+' or (byte)'-': return Keep(b, State.ExponentSign);
            case State.ExponentMark or State.ExponentSign or State.Exponent when digit: return Keep(b, State.Exponent);
            case State.Zero or State.Digits or State.Fraction or State.Exponent: return !EndToken(QmpToken.Number);
            default: return Stray(b);
        }
    }

    private static bool IsStructural(byte b) => b is (byte)'{' or (byte)'}' or (byte)'[' or (byte)']' or (byte)':' or (byte)',';

    private bool Keep(byte b, State next)
    {
        if (_tokenBytes == 0) (_tokenLine, _tokenColumn) = (_line, _column);
        if (_tokenBytes == _token.Length) Array.Resize(ref _token, _token.Length * 2);
        _token[_tokenBytes++] = b;
        _state = next;
        return true;
    }

    private bool Stray(byte b)
    {
        Keep(b, State.Recovery);
        string shown = Encoding.UTF8.GetString(_token.AsSpan(0, Math.Min(_tokenBytes, 64)));
        Fail($"{_tokenLine}:{_tokenColumn}: JSON parse error, stray '{shown}'");
        _state = State.Recovery;
        return true;
    }

    private bool EndToken(QmpToken type)
    {
        _state = State.Start;
        ReadOnlySpan<byte> text = _token.AsSpan(0, _tokenBytes);
        _objectBytes += _tokenBytes + 1;
        _tokenBytes = 0;
        switch (type)
        {
            case QmpToken.OpenObject: _braces++; break;
            case QmpToken.CloseObject: _braces--; break;
            case QmpToken.OpenArray: _brackets++; break;
            case QmpToken.CloseArray: _brackets--; break;
        }
        if (_objectBytes > _maxTokenBytes) Fail("JSON token size limit exceeded");
        else if (++_tokens > WireLimits.QmpTokens) Fail("JSON token count limit exceeded");
        else if (_braces + _brackets > WireLimits.QmpNesting) Fail("JSON nesting depth limit exceeded");
        else
        {
            _tree.Add(type, text, _tokenLine, _tokenColumn);
            // After a grammar error the rest of the object is skipped up to its end, so that one object yields one answer.
            if ((_braces > 0 || _brackets > 0) && _braces >= 0 && _brackets >= 0) return true;
            Emit(_tree.Error is null ? new QmpInput(_tree.Root, null) : new QmpInput(null, _tree.Error));
        }
        return true;
    }

    private void Fail(string error)
    {
        _state = State.Start;
        Emit(new QmpInput(null, error));
    }

    private void Emit(QmpInput input)
    {
        _found.Enqueue(input);
        _tree.Clear();
        _tokenBytes = _objectBytes = _tokens = _braces = _brackets = 0;
        // One huge token must not occupy memory for the rest of the connection.
        if (_token.Length > 1 << 20) _token = new byte[256];
    }
}

/// <summary>Token kinds; structural ones have their character as value.</summary>
internal enum QmpToken
{
    String = 1,
    Number,
    Keyword,
    OpenObject = '{',
    CloseObject = '}',
    OpenArray = '[',
    CloseArray = ']',
    Colon = ':',
    Comma = ',',
}

/// <summary>
/// Builds one JSON value from tokens and checks the grammar. Keeps the first error, with QEMU 11.1's text and position, which is the start of the
/// token.
/// </summary>
internal sealed class QmpJsonTree
{
    private enum Expect { Value, ValueOrEnd, Key, KeyOrEnd, Colon, CommaOrEnd }

    private readonly Stack<(JsonNode Container, string? Key)> _open = new();
    private Expect _expect = Expect.Value;
    private string? _key;

    internal JsonNode? Root { get; private set; }

    internal string? Error { get; private set; }

    internal void Clear()
    {
        _open.Clear();
        _expect = Expect.Value;
        Root = null;
        Error = null;
    }

    internal void Add(QmpToken type, ReadOnlySpan<byte> text, int line, int column)
    {
        if (Error is not null) return;
        string? problem = Take(type, text);
        if (problem is not null) Error = string.Create(CultureInfo.InvariantCulture, $"{line}:{column}: JSON parse error, {problem}");
    }

    private string? Take(QmpToken type, ReadOnlySpan<byte> text)
    {
        switch (_expect)
        {
            case Expect.Colon:
                if (type != QmpToken.Colon) return "expecting ':'";
                _expect = Expect.Value;
                return null;
            case Expect.CommaOrEnd:
                bool inObject = _open.Peek().Container is JsonObject;
                if (type == (inObject ? QmpToken.CloseObject : QmpToken.CloseArray)) return Close();
                if (type != QmpToken.Comma) return inObject ? "expected ',' or '}'" : "expected ',' or ']'";
                _expect = inObject ? Expect.Key : Expect.Value;
                return null;
            case Expect.KeyOrEnd when type == QmpToken.CloseObject:
            case Expect.ValueOrEnd when type == QmpToken.CloseArray:
                return Close();
            case Expect.Key or Expect.KeyOrEnd:
                return Key(type, text);
            default:
                return Value(type, text);
        }
    }

    private string? Key(QmpToken type, ReadOnlySpan<byte> text)
    {
        if (type != QmpToken.String) return "expecting key";
        string? problem = QmpJsonText.TryDecode(text, out string key);
        _key = key;
        _expect = Expect.Colon;
        return problem;
    }

    private string? Value(QmpToken type, ReadOnlySpan<byte> text)
    {
        switch (type)
        {
            case QmpToken.OpenObject: return Open(new JsonObject(), Expect.KeyOrEnd);
            case QmpToken.OpenArray: return Open(new JsonArray(), Expect.ValueOrEnd);
            case QmpToken.String: return QmpJsonText.TryDecode(text, out string s) ?? Put(JsonValue.Create(s));
            case QmpToken.Number: return Put(QmpJsonText.Number(text));
            case QmpToken.Keyword when text.SequenceEqual("true"u8): return Put(JsonValue.Create(true));
            case QmpToken.Keyword when text.SequenceEqual("false"u8): return Put(JsonValue.Create(false));
            case QmpToken.Keyword when text.SequenceEqual("null"u8): return Put(null);
            case QmpToken.Keyword: return $"invalid keyword '{Encoding.ASCII.GetString(text[..Math.Min(text.Length, 64)])}'";
            default: return "expecting value";
        }
    }

    private string? Open(JsonNode container, Expect next)
    {
        _open.Push((container, _key));
        _expect = next;
        return null;
    }

    private string? Close()
    {
        (JsonNode container, _key) = _open.Pop();
        return Put(container);
    }

    private string? Put(JsonNode? value)
    {
        _expect = Expect.CommaOrEnd;
        if (!_open.TryPeek(out (JsonNode Container, string? Key) parent)) Root = value;
        else if (parent.Container is JsonArray a) a.Add(value);
        // As in QEMU, a duplicate key is reported when its value is complete.
        else if (!((JsonObject)parent.Container).TryAdd(_key!, value)) return "duplicate key";
        return null;
    }
}
