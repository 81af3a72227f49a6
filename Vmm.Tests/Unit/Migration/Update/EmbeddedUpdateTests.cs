using System.Diagnostics;

namespace Vmm.Tests.Unit.Migration.Update;

/// <summary>An embedder's program, which does not use the command <c>vmm</c>, updates itself and keeps its VM.</summary>
[TestFixture]
public class EmbeddedUpdateTests
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(60);

    [TestCase("transfer", ExpectedResult = "new process: Running, memory 'hello', counter 42; old process: PostMigrate, new process is another: True")]
    [TestCase("exec", ExpectedResult = "new process: Running, memory 'hello', counter 42")]
    public async Task<string> TheSampleCarriesItsVmIntoANewProcess(string method)
    {
        var info = new ProcessStartInfo(Path.Combine(AppContext.BaseDirectory, "EmbeddedVmm"), ["update", method]) { RedirectStandardOutput = true, RedirectStandardError = true };
        using Process first = Process.Start(info)!;
        // Both processes write to this pipe, in either order; the pipe ends when the last of them exits.
        using var limit = new CancellationTokenSource(s_deadline);
        Task<string> output = first.StandardOutput.ReadToEndAsync(limit.Token), errors = first.StandardError.ReadToEndAsync(limit.Token);
        await first.WaitForExitAsync(limit.Token);
        Assert.That(first.ExitCode, Is.Zero, await errors);
        return string.Join("; ", (await output).Split('\n', StringSplitOptions.RemoveEmptyEntries).Order());
    }
}
