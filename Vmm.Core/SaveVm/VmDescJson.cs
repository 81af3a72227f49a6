using System.Text;

namespace Vmm.Core.SaveVm;

/// <summary>The differences between the VMDESC forms of QEMU versions (stream 2.6). Receivers discard VMDESC; only tools see them.</summary>
internal sealed record VmDescOptions
{
    /// <summary>The form of QEMU 11.1, our default.</summary>
    public static VmDescOptions Qemu111 { get; } = new();

    /// <summary>The form of QEMU 10.0.</summary>
    public static VmDescOptions Qemu100 { get; } = new() { WriteIndex = true, NullMarkerType = "nullptr" };

    /// <summary>The form of QEMU 7.2.</summary>
    public static VmDescOptions Qemu72 { get; } = new() { WriteIndex = true, NullMarkerType = null };

    /// <summary>Each element of an array that is not compressed has a member <c>"index"</c>.</summary>
    public bool WriteIndex { get; init; }

    /// <summary>Type name for runs of null pointers. Null writes the array's own type instead, as QEMU 7.2 does by mistake.</summary>
    public string? NullMarkerType { get; init; } = "ptr-marker";
}

/// <summary>
/// Writes JSON in the form of QEMU's VMDESC: one line, <c>", "</c> and <c>": "</c> as separators, keys in call order, repeated keys allowed
/// (stream 1.6). No general JSON writer produces that form.
/// </summary>
/// <param name="options">The QEMU version's form; null for 11.1's.</param>
internal sealed class VmDescJson(VmDescOptions? options = null)
{
    private readonly StringBuilder _text = new();
    private bool _first = true;

    /// <summary>The QEMU version's form.</summary>
    public VmDescOptions Options { get; } = options ?? VmDescOptions.Qemu111;

    /// <summary>Opens an object: a member of that name, or with null an element of an array or the root.</summary>
    public void StartObject(string? name = null) => Open(name, '{');

    /// <summary>Closes an object.</summary>
    public void EndObject() => Close('}');

    /// <summary>Opens an array: a member of that name, or with null an element of an array.</summary>
    public void StartArray(string? name = null) => Open(name, '[');

    /// <summary>Closes an array.</summary>
    public void EndArray() => Close(']');

    /// <summary>Writes a string member.</summary>
    public void Member(string name, string value)
    {
        Name(name);
        Quote(value);
    }

    /// <summary>Writes a number member.</summary>
    public void Member(string name, long value)
    {
        Name(name);
        _text.Append(value);
    }

    /// <summary>Writes a bool member.</summary>
    public void Member(string name, bool value)
    {
        Name(name);
        _text.Append(value ? "true" : "false");
    }

    /// <summary>Inserts the text of another writer as the next element, or as members of the open object. An empty text changes nothing.</summary>
    public void Raw(VmDescJson piece)
    {
        ArgumentNullException.ThrowIfNull(piece);
        if (piece._text.Length == 0) return;
        Separate();
        _text.Append(piece._text);
        _first = false;
    }

    /// <summary>The text as ASCII bytes.</summary>
    public byte[] ToBytes() => Encoding.ASCII.GetBytes(_text.ToString());

    /// <inheritdoc/>
    public override string ToString() => _text.ToString();

    private void Open(string? name, char bracket)
    {
        if (name is null) Separate();
        else Name(name);
        _text.Append(bracket);
        _first = true;
    }

    private void Close(char bracket)
    {
        _text.Append(bracket);
        _first = false;
    }

    private void Name(string name)
    {
        Separate();
        Quote(name);
        _text.Append(": ");
    }

    private void Separate()
    {
        if (!_first) _text.Append(", ");
        _first = false;
    }

    private void Quote(string value)
    {
        _text.Append('"');
        foreach (char c in value)
        {
            if (c is '"' or '\\') _text.Append('\\').Append(c);
            else if (c is < ' ' or > '~') _text.Append("\\u").Append(((int)c).ToString("X4"));
            else _text.Append(c);
        }
        _text.Append('"');
    }
}
