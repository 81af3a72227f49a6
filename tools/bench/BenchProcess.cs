using System.Diagnostics;
using System.Text.Json;

namespace Vmm.Tools.Bench;

/// <summary>A child process that runs a hidden command of this program and communicates by lines.</summary>
internal class BenchProcess : IDisposable
{
    private readonly Process _process;

    internal BenchProcess(params string[] arguments)
    {
        string self = Environment.ProcessPath!;
        var info = new ProcessStartInfo(self) { RedirectStandardInput = true, RedirectStandardOutput = true };
        if (Path.GetFileNameWithoutExtension(self) == "dotnet") info.ArgumentList.Add(Path.Combine(AppContext.BaseDirectory, "bench.dll"));
        foreach (string one in arguments) info.ArgumentList.Add(one);
        _process = Process.Start(info)!;
    }

    internal double CpuSeconds => Cpu.Seconds(_process.Id);

    internal string ReadLine() => _process.StandardOutput.ReadLine() ?? throw new InvalidOperationException("a child ended early");

    internal void Expect(string line)
    {
        string found = ReadLine();
        if (found != line) throw new InvalidOperationException($"a child sent '{found}', expected '{line}'");
    }

    internal void WriteLine(string line) => _process.StandardInput.WriteLine(line);

    public void Dispose()
    {
        _process.StandardInput.Close();
        if (!_process.WaitForExit(5000)) _process.Kill();
        _process.Dispose();
        GC.SuppressFinalize(this);
    }
}

/// <summary>A child that runs <see cref="Node"/>.</summary>
internal sealed class NodeProcess(int sizeMiB, string? file, bool incoming, bool running, string[]? more = null)
    : BenchProcess(Arguments(sizeMiB, file, incoming, running, more ?? []))
{
    internal NodeResult Result()
    {
        NodeResult result = JsonSerializer.Deserialize<NodeResult>(ReadLine())!;
        return result.Status == "completed" ? result : throw new InvalidOperationException($"migration ended as {result.Status}: {result.Error}");
    }

    private static string[] Arguments(int sizeMiB, string? file, bool incoming, bool running, string[] more)
    {
        List<string> arguments = ["node", "--size", $"{sizeMiB}"];
        if (file is not null) arguments.AddRange(["--ram-file", file]);
        if (incoming) arguments.Add("--incoming");
        if (running) arguments.Add("--running");
        arguments.AddRange(more);
        return [.. arguments];
    }
}
