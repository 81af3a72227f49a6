using System.Diagnostics;

namespace Vmm.Tests.Support;

/// <summary>Runs a program to its end.</summary>
internal static class Shell
{
    internal static (int Status, string Output, string Errors) Run(string program, params string[] arguments)
    {
        var info = new ProcessStartInfo(program) { RedirectStandardOutput = true, RedirectStandardError = true };
        foreach (string one in arguments) info.ArgumentList.Add(one);
        using Process process = Process.Start(info)!;
        Task<string> errors = process.StandardError.ReadToEndAsync();
        string output = process.StandardOutput.ReadToEnd();
        if (!process.WaitForExit(TimeSpan.FromSeconds(60)))
        {
            process.Kill(entireProcessTree: true);
            Assert.Fail($"{program} did not end within 60 s");
        }
        return (process.ExitCode, output, errors.Result);
    }
}
