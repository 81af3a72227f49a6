namespace Vmm.Tools.Cli.Shell;

/// <summary>A QMP error answer.</summary>
/// <param name="errorClass">QMP's class, e.g. <c>GenericError</c>.</param>
/// <param name="description">QMP's text.</param>
internal sealed class MonitorException(string errorClass, string description) : Exception(description)
{
    public string ErrorClass { get; } = errorClass;
}
