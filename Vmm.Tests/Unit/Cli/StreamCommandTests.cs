using System.Text.Json;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Unit.Cli;

internal sealed class StreamCommandTests
{
    private static Task<CliResult> Run(params string[] arguments) => new FakeMonitor().RunAlone(["stream", .. arguments]);

    [Test]
    public async Task A_good_stream_is_shown_and_passes_the_check()
    {
        using var folder = new TempDirectory();
        string file = Write(folder, Golden.Read("q35-111-devices.bin"));
        CliResult show = await Run("show", file), check = await Run("check", file), json = await Run("show", "--json", file);
        Assert.Multiple(() =>
        {
            Assert.That((show.Code, check.Code, json.Code), Is.EqualTo((ExitCode.Ok, ExitCode.Ok, ExitCode.Ok)), show.Error + check.Error);
            Assert.That(show.Out, Does.Contain("machine pc-q35-11.1").And.Contain("FULL 38 '0000:00:02.0/virtio-net'"));
            Assert.That(check.Out, Is.EqualTo($"\n{file}: well-formed, 40 entries\n"));
            Assert.That(JsonDocument.Parse(json.Out).RootElement.GetProperty("entries").GetArrayLength(), Is.EqualTo(40));
        });
    }

    [Test]
    public async Task Pages_are_listed_when_asked_for()
    {
        using var folder = new TempDirectory();
        string file = Write(folder, Golden.Read("none-111-plain.bin"));
        CliResult plain = await Run("show", file);
        Assert.That(plain.Code, Is.EqualTo(ExitCode.Ok));
        Assert.That(plain.Out, Does.Not.Contain("m+0x1000"));
        Assert.That((await Run("show", "--pages", file)).Out, Does.Contain("page m+0x1000").And.Contain("zero m+0x2000"));
    }

    [Test]
    public async Task A_broken_stream_is_shown_as_far_as_it_goes_and_fails_the_check()
    {
        using var folder = new TempDirectory();
        string file = Write(folder, Golden.Read("none-111-plain.bin")[..20000]);
        CliResult show = await Run("show", file), check = await Run("check", file), json = await Run("check", "--json", file);
        Assert.Multiple(() =>
        {
            Assert.That((show.Code, check.Code, json.Code), Is.EqualTo((ExitCode.Failed, ExitCode.Failed, ExitCode.Failed)));
            Assert.That(show.Out, Does.Contain("START 1 'ram'").And.Contain("the stream ended at offset 20000"));
            Assert.That(check.Out, Does.Match("fatal: offset 0x[0-9a-f]+ \\(ram/0\\)").And.Contain("not read to the end"));
            Assert.That(JsonDocument.Parse(json.Out).RootElement.GetProperty("findings")[0].GetProperty("severity").GetString(), Is.EqualTo("fatal"));
        });
    }

    [Test]
    public async Task A_missing_file_is_one_line_on_stderr()
    {
        CliResult result = await Run("check", "/nonexistent/file");
        Assert.That((result.Code, result.Out), Is.EqualTo((ExitCode.Failed, "")));
        Assert.That(result.Error, Does.Contain("/nonexistent/file"));
    }

    private static string Write(TempDirectory folder, byte[] bytes)
    {
        string file = Path.Combine(folder.Path, "stream");
        File.WriteAllBytes(file, bytes);
        return file;
    }
}
