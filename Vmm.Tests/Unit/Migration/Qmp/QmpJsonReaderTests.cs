using System.Text;
using System.Text.Json.Nodes;
using NUnit.Framework;
using Vmm.Migration.Qmp;

namespace Vmm.Tests.Unit.Migration.Qmp;

[TestFixture]
[Parallelizable(ParallelScope.All)]
public sealed class QmpJsonReaderTests
{
    private static List<string> Read(byte[] bytes, int piece, int maxTokenBytes = QmpJsonReader.MaxTokenBytes)
    {
        var reader = new QmpJsonReader(maxTokenBytes);
        var found = new List<string>();
        for (int at = 0; at < bytes.Length; at += piece)
        {
            reader.Feed(bytes.AsSpan(at, Math.Min(piece, bytes.Length - at)));
            while (reader.TryTake(out QmpInput input))
                found.Add(input.Error is not null ? "!" + input.Error : QmpJsonText.Append(new StringBuilder(), input.Value).ToString());
        }
        return found;
    }

    private static List<string> Read(string text, int piece = int.MaxValue) => Read(Encoding.Latin1.GetBytes(text), Math.Min(piece, Math.Max(1, text.Length)));

    [TestCase("{}", "{}")]
    [TestCase("  {\"a\": [1, 2.50, -3e+2, true, false, null, {}]}", "{\"a\": [1, 2.50, -3e+2, true, false, null, {}]}")]
    [TestCase("{'a': 'it\\'s \"x\"'}", "{\"a\": \"it's \\\"x\\\"\"}")]
    [TestCase("{\"a\":\"\\u00e9\\ud83d\\ude00\\n\\/\"}", "{\"a\": \"\\u00E9\\uD83D\\uDE00\\n/\"}")]
    [TestCase("{\"a\":\"\u00c3\u00a9\u00c0\u0080\"}", "{\"a\": \"\\u00E9\\u0000\"}")]
    [TestCase("18446744073709551615 -9223372036854775808 ", "18446744073709551615|-9223372036854775808")]
    [TestCase("{}{}\r\n[]\"s\"true ", "{}|{}|[]|\"s\"|true")]
    public void Values_are_cut_wherever_reads_split_them(string text, string expected)
    {
        for (int piece = 1; piece <= text.Length; piece++)
            Assert.That(string.Join('|', Read(text, piece)), Is.EqualTo(expected), $"pieces of {piece}");
    }

    [TestCase("\n{ \"execute\": }", "2:14: JSON parse error, expecting value")]
    [TestCase("{\"a\" 1}", "1:6: JSON parse error, expecting ':'")]
    [TestCase("{\"a\":1 \"b\"}", "1:8: JSON parse error, expected ',' or '}'")]
    [TestCase("[1 2]", "1:4: JSON parse error, expected ',' or ']'")]
    [TestCase("{5:1}", "1:2: JSON parse error, expecting key")]
    [TestCase("{\"a\":1,\"a\":{\"b\":1}}", "1:18: JSON parse error, duplicate key")]
    [TestCase("{\"a\":1,\"a\":2}", "1:12: JSON parse error, duplicate key")]
    [TestCase("[nul]", "1:2: JSON parse error, invalid keyword 'nul'")]
    [TestCase("\"\\x\"", "1:1: JSON parse error, invalid escape sequence in string")]
    [TestCase("\"\\ud800\"", "1:1: JSON parse error, \\ud800 is not a valid Unicode character")]
    [TestCase("\"\\ud800\\u0041\"", "1:1: JSON parse error, \\ud800 is not a valid Unicode character")]
    [TestCase("\"\u00c3(\"", "1:1: JSON parse error, invalid UTF-8 sequence in string")]
    [TestCase("\"\u00ed\u00a0\u0080\"", "1:1: JSON parse error, invalid UTF-8 sequence in string")]
    [TestCase("]", "1:1: JSON parse error, expecting value")]
    [TestCase("{} @\n", "1:4: JSON parse error, stray '@'")]
    [TestCase("01\n", "1:1: JSON parse error, stray '01'")]
    [TestCase("{\"a\":1,}", "1:8: JSON parse error, expecting key")]
    [TestCase("{]", "1:2: JSON parse error, expecting key")]
    [TestCase("\"abc\n", "1:1: JSON parse error, stray '\"abc\n'")]
    [TestCase("[1,]", "1:4: JSON parse error, expecting value")]
    public void Bad_input_yields_one_error_with_its_place_and_QEMUs_words(string text, string expected) =>
        Assert.That(Read(text + "{}").Where(static s => s != "{}"), Is.EqualTo(new[] { "!" + expected }));

    [TestCase("\u0001")]
    [TestCase("\u00ff")]
    [TestCase("{\"a\": [1, \"half\u0001")]
    [TestCase("{\"a\": [1, \"half\u00ff")]
    [TestCase("{\"a\": \u00ff")]
    public void A_control_byte_drops_what_is_open_with_one_error(string text)
    {
        List<string> found = Read(text + "{\"ok\":1}");
        using (Assert.EnterMultipleScope())
        {
            Assert.That(found, Has.Count.EqualTo(2));
            Assert.That(found[0], Does.StartWith("!1:").And.Contain("stray"));
            Assert.That(found[^1], Is.EqualTo("{\"ok\": 1}"));
        }
    }

    [Test]
    public void Nesting_of_1024_is_read_and_one_more_is_an_error()
    {
        string deep = new string('[', 1024) + new string(']', 1024);
        using (Assert.EnterMultipleScope())
        {
            Assert.That(Read(deep), Is.EqualTo(new[] { deep }));
            Assert.That(Read("[" + deep)[0], Is.EqualTo("!JSON nesting depth limit exceeded"));
            Assert.That(Read(new string('{', 5000) + "\u00ff{}")[^1], Is.EqualTo("{}"));
        }
    }

    [Test]
    public void Too_long_a_token_or_object_is_an_error_and_not_the_end()
    {
        byte[] token = Encoding.ASCII.GetBytes("\"" + new string('x', 2000) + "\"\u00ff");
        byte[] many = Encoding.ASCII.GetBytes("[" + string.Join(',', Enumerable.Repeat("\"0123456789\"", 200)) + "]\u0001{}");
        using (Assert.EnterMultipleScope())
        {
            Assert.That(Read(token, 100, 1000)[0], Is.EqualTo("!JSON token size limit exceeded"));
            Assert.That(Read(many, 100, 1000)[0], Is.EqualTo("!JSON token size limit exceeded"));
            Assert.That(Read(many, 100, 1000)[^1], Is.EqualTo("{}"));
        }
    }

    [Test]
    public void Two_million_tokens_are_the_limit()
    {
        byte[] bytes = new byte[(2 << 20) + 16];
        bytes.AsSpan().Fill((byte)',');
        for (int i = 1; i < bytes.Length; i += 2) bytes[i] = (byte)'1';
        bytes[0] = (byte)'[';
        Assert.That(Read(bytes, 1 << 16), Does.Contain("!JSON token count limit exceeded"));
    }

    [Test]
    public void Random_bytes_never_break_the_reader_and_a_resync_brings_it_back([Range(1, 20)] int seed)
    {
        var random = new Random(seed);
        string alphabet = "{}[]:,\"'\\u0019azeE+-. \n\u0001\u00ff\u00c3\u00a9tfn";
        for (int round = 0; round < 200; round++)
        {
            string text = string.Concat(Enumerable.Range(0, random.Next(1, 200)).Select(_ => alphabet[random.Next(alphabet.Length)]));
            List<string> whole = Read(text + "\u00ff{\"ok\":1}"), split = Read(text + "\u00ff{\"ok\":1}", random.Next(1, 7));
            Assert.That(split, Is.EqualTo(whole), "the split must not change the result");
            Assert.That(whole[^1], Is.EqualTo("{\"ok\": 1}"), text);
        }
    }

    [Test]
    public void Written_values_are_one_line_of_ASCII_and_read_back_equal()
    {
        var value = new JsonObject { ["k\u00e9y"] = new JsonArray("\u0001\x7f\ud83d\ude00\"\\", 1, -2.5, true, null, ulong.MaxValue) };
        byte[] line = QmpJsonText.Line(value);
        using (Assert.EnterMultipleScope())
        {
            Assert.That(line[..^2], Has.All.InRange((byte)0x20, (byte)0x7e));
            Assert.That(line[^2..], Is.EqualTo("\r\n"u8.ToArray()));
            Assert.That(JsonNode.DeepEquals(JsonNode.Parse(line), value));
        }
    }
}
